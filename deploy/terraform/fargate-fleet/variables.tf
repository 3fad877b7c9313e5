variable "control_plane" {
  description = "Output for_fleets of the control plane."
  type = object({
    farm                = string
    vpc_id              = string
    api_url             = string
    worker_secret       = string
    scheduler_role      = string
    api_role            = string
    load_balancer_group = string
  })
}

variable "fleet" {
  description = "Name of the fleet, as 'millrace fleet set' has it."
  type        = string
  default     = "tasks"

  validation {
    condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$", var.fleet))
    error_message = "At most 40 letters, digits, hyphens and underscores."
  }
}

variable "subnets" {
  description = "Private subnets with a way out (NAT), in two zones or more; or public ones, with public_ip."
  type        = list(string)
}

variable "public_ip" {
  description = "Whether a task has an address of its own in the internet, where its subnets have no NAT."
  type        = bool
  default     = false
}

variable "spot" {
  description = "Whether tasks are spot ones. A build whose task is taken away starts anew."
  type        = bool
  default     = false
}

variable "bundle_image" {
  description = "Image that carries the worker into the build's own (make bundle), in a registry that ECS reaches. A digest is best."
  type        = string
}

variable "architecture" {
  description = "What the bundle and the images of builds were made for."
  type        = string
  default     = "X86_64"

  validation {
    condition     = contains(["X86_64", "ARM64"], var.architecture)
    error_message = "X86_64 or ARM64."
  }
}

variable "disk_gigabytes" {
  description = "Disk of a task, for its image and its workspace."
  type        = number
  default     = 50

  validation {
    condition     = var.disk_gigabytes >= 21 && var.disk_gigabytes <= 200
    error_message = "21 to 200."
  }
}

variable "build_role_arn" {
  description = "Role that builds of this fleet may use; null, and they have none. Every build of the fleet can take it."
  type        = string
  default     = null
}

variable "log_days" {
  description = "Days that the workers' own logs are kept."
  type        = number
  default     = 30
}
