variable "farm" {
  description = "Name of the farm; it stands before the names of all that is made."
  type        = string
  default     = "millrace"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,18}[a-z0-9]$", var.farm))
    error_message = "2 to 20 of a-z, 0-9 and hyphens, beginning with a letter."
  }
}

variable "vpc_id" {
  description = "Network of the farm. One of its own is best, as builds reach what is open to the whole network."
  type        = string
}

variable "private_subnets" {
  description = "Subnets of API, scheduler, database and Redis, in two zones or more, with a way out."
  type        = list(string)

  validation {
    condition     = length(var.private_subnets) >= 2
    error_message = "Two subnets or more, in different zones."
  }
}

variable "load_balancer_subnets" {
  description = "Subnets of the load balancer, in two zones or more; public ones for an internet-facing one."
  type        = list(string)

  validation {
    condition     = length(var.load_balancer_subnets) >= 2
    error_message = "Two subnets or more, in different zones."
  }
}

variable "internet_facing" {
  description = "Whether the load balancer is reached from the internet; webhooks of public git servers need that."
  type        = bool
  default     = false
}

variable "client_cidrs" {
  description = "Addresses that may call the API. With an internet-facing one, the NAT gateways of the workers' subnets must be among them."
  type        = list(string)
  default     = ["10.0.0.0/8"]

  validation {
    condition     = alltrue([for cidr in var.client_cidrs : can(cidrhost(cidr, 0))])
    error_message = "IPv4 or IPv6 ranges, such as 10.0.0.0/8."
  }
}

variable "domain_name" {
  description = "Name at which the API is reached; point it to the load balancer (output load_balancer) afterwards."
  type        = string

  validation {
    condition     = can(regex("^([a-z0-9]([a-z0-9-]*[a-z0-9])?\\.)+[a-z]{2,}$", var.domain_name))
    error_message = "A host name in lower case, such as millrace.example.org."
  }
}

variable "certificate_arn" {
  description = "Certificate of the domain name, in ACM of this region."
  type        = string

  validation {
    condition     = can(regex("^arn:aws[a-z-]*:acm:", var.certificate_arn))
    error_message = "The ARN of a certificate in ACM."
  }
}

variable "image" {
  description = "Image of Millrace (deploy/millrace.Dockerfile, target farm) in a registry that ECS reaches. A digest is best."
  type        = string
}

variable "architecture" {
  description = "What the image was built for."
  type        = string
  default     = "X86_64"

  validation {
    condition     = contains(["X86_64", "ARM64"], var.architecture)
    error_message = "X86_64 or ARM64."
  }
}

variable "api_tasks" {
  description = "Tasks of the API."
  type        = number
  default     = 2
}

variable "scheduler_tasks" {
  description = "Tasks of the scheduler; one acts, the others wait for its end."
  type        = number
  default     = 2
}

variable "database_class" {
  description = "Size of PostgreSQL."
  type        = string
  default     = "db.t4g.small"
}

variable "database_gigabytes" {
  description = "Disk of PostgreSQL at the beginning; it grows."
  type        = number
  default     = 20

  validation {
    condition     = var.database_gigabytes >= 20
    error_message = "20 at least."
  }
}

variable "standby" {
  description = "Whether PostgreSQL and Redis have a standby in another zone. Twice the price."
  type        = bool
  default     = true
}

variable "redis_node_type" {
  description = "Size of Redis, which holds the bell and nothing that is not in the database."
  type        = string
  default     = "cache.t4g.small"
}

variable "backup_days" {
  description = "Days that PostgreSQL can be brought back to."
  type        = number
  default     = 7

  validation {
    condition     = var.backup_days >= 1 && var.backup_days <= 35
    error_message = "1 to 35."
  }
}

variable "deleted_days" {
  description = "Days that deleted objects can be brought back; more than backup_days, so that a database of then finds its objects."
  type        = number
  default     = 8
}

variable "log_days" {
  description = "Days that the farm's own log is kept. Logs of builds lie in the bucket."
  type        = number
  default     = 30
}

variable "protected" {
  description = "Whether database and load balancer refuse to be deleted. Set it to false before all is taken down."
  type        = bool
  default     = true
}
