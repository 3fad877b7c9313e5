output "group" {
  description = "For 'millrace fleet set': --provider-option group=..."
  value       = aws_autoscaling_group.fleet.name
}

output "region" {
  description = "For 'millrace fleet set': --provider-option region=..."
  value       = local.region
}

output "fleet_set" {
  description = "The command that hands the group to the farm."
  value       = "millrace fleet set ${var.fleet} --provider ec2 --provider-option group=${aws_autoscaling_group.fleet.name} --provider-option region=${local.region} --slots ${var.slots} --maximum ${var.most_instances}"
}

output "worker_group" {
  description = "Security group of the instances, to open a git server or a registry of one's own to them."
  value       = aws_security_group.workers.id
}
