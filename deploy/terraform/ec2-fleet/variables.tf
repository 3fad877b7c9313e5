variable "control_plane" {
  description = "Output for_fleets of the control plane."
  type = object({
    farm                = string
    vpc_id              = string
    api_url             = string
    worker_secret       = string
    scheduler_role      = string
    api_role            = string
    redis_group         = string
    load_balancer_group = string
  })
}

variable "fleet" {
  description = "Name of the fleet, as 'millrace fleet set' has it."
  type        = string
  default     = "default"

  validation {
    condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$", var.fleet))
    error_message = "At most 40 letters, digits, hyphens, dots and underscores."
  }
}

variable "most_instances" {
  description = "Most instances that the group may have, whatever the farm asks for."
  type        = number
  default     = 10
}

variable "subnets" {
  description = "Private subnets with a way out (NAT), in two zones or more."
  type        = list(string)
}

variable "instance_types" {
  description = "Types of the instances, all of one size, the best first. Spot capacity is found more often with three."
  type        = list(string)
  default     = ["c6i.xlarge"]

  validation {
    condition     = length(var.instance_types) > 0
    error_message = "One type or more."
  }
}

variable "on_demand_base" {
  description = "The first so many instances are on-demand ones."
  type        = number
  default     = 0
}

variable "on_demand_percent" {
  description = "Share of on-demand instances among those beyond, in percent; the rest are spot."
  type        = number
  default     = 100

  validation {
    condition     = var.on_demand_percent >= 0 && var.on_demand_percent <= 100
    error_message = "0 to 100."
  }
}

variable "machine_image" {
  description = "Parameter that names the machine image; Ubuntu 24.04 or Debian 13, of the instance types' architecture."
  type        = string
  default     = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
}

variable "root_device" {
  description = "The machine image's root device; /dev/sda1 for Ubuntu, /dev/xvda for Debian."
  type        = string
  default     = "/dev/sda1"
}

variable "disk_gigabytes" {
  description = "Disk of an instance, for images, workspaces, mirrors and caches."
  type        = number
  default     = 100

  validation {
    condition     = var.disk_gigabytes >= 20
    error_message = "20 at least."
  }
}

variable "image" {
  description = "Image of the worker (deploy/millrace.Dockerfile, target worker) in ECR of this account and region, or in a registry that asks for no password."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9./:@_-]{0,499}$", var.image))
    error_message = "The name of an image in a registry."
  }
}

variable "slots" {
  description = "Builds that an instance runs at once; the fleet's worker.slots must say the same."
  type        = number
  default     = 2
}

variable "drain_seconds" {
  description = "Time that a worker gives its builds when its host is to go; a spot instance has two minutes in all."
  type        = number
  default     = 60

  validation {
    condition     = var.drain_seconds >= 0 && var.drain_seconds <= 90
    error_message = "0 to 90."
  }
}

variable "builds_reach" {
  description = "Whether builds reach the 'internet' only, or private addresses of the 'network' too. Never the metadata."
  type        = string
  default     = "internet"

  validation {
    condition     = contains(["internet", "network"], var.builds_reach)
    error_message = "internet or network."
  }
}

variable "log_days" {
  description = "Days that the workers' own logs are kept."
  type        = number
  default     = 30
}
