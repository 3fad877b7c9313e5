# A whole farm: the control plane, a fleet on EC2 and one on Fargate. What is yours comes in as variables.

terraform {
  required_version = ">= 1.5"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.60"
    }
  }
}

variable "region" {
  description = "Where the farm is."
  type        = string
}

variable "vpc_id" {
  description = "Its network."
  type        = string
}

variable "private_subnets" {
  description = "Subnets with a way out, in two zones or more."
  type        = list(string)
}

variable "domain_name" {
  description = "Name at which the API is reached."
  type        = string
}

variable "certificate_arn" {
  description = "Its certificate, in ACM."
  type        = string
}

variable "registry" {
  description = "Registry that has the images millrace, millrace-worker and millrace-bundle."
  type        = string
}

variable "release" {
  description = "Their tag."
  type        = string
}

provider "aws" {
  region = var.region
}

module "millrace" {
  source                = "../control-plane"
  vpc_id                = var.vpc_id
  private_subnets       = var.private_subnets
  load_balancer_subnets = var.private_subnets
  domain_name           = var.domain_name
  certificate_arn       = var.certificate_arn
  image                 = "${var.registry}/millrace:${var.release}"
}

module "machines" {
  source            = "../ec2-fleet"
  control_plane     = module.millrace.for_fleets
  fleet             = "default"
  subnets           = var.private_subnets
  instance_types    = ["c6i.xlarge", "c5.xlarge", "m6i.xlarge"]
  on_demand_percent = 0
  most_instances    = 20
  image             = "${var.registry}/millrace-worker:${var.release}"
}

module "tasks" {
  source        = "../fargate-fleet"
  control_plane = module.millrace.for_fleets
  subnets       = var.private_subnets
  bundle_image  = "${var.registry}/millrace-bundle:${var.release}"
}

output "load_balancer" {
  description = "Where the domain name must point to."
  value       = module.millrace.load_balancer
}

output "admin_token_secret" {
  description = "Secret that holds the admin token."
  value       = module.millrace.admin_token_secret
}

output "fleet_set" {
  description = "The commands that hand the fleets to the farm."
  value       = [module.machines.fleet_set, module.tasks.fleet_set]
}
