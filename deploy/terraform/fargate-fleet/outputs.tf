output "cluster" {
  description = "For 'millrace fleet set': --provider-option cluster=..."
  value       = aws_ecs_cluster.fleet.name
}

output "task_definition" {
  description = "For 'millrace fleet set': --provider-option taskDefinition=...; without a revision, so that the newest counts."
  value       = aws_ecs_task_definition.template.family
}

output "worker_group" {
  description = "For 'millrace fleet set': --provider-option securityGroups=..."
  value       = aws_security_group.workers.id
}

output "fleet_set" {
  description = "The command that hands the cluster to the farm; --maximum as you like."
  value = join(" ", concat(
    ["millrace fleet set ${var.fleet} --provider fargate --slots 1"],
    [for key, value in {
      region         = local.region
      cluster        = aws_ecs_cluster.fleet.name
      taskDefinition = aws_ecs_task_definition.template.family
      subnets        = join(",", var.subnets)
      securityGroups = aws_security_group.workers.id
      assignPublicIp = var.public_ip
      spot           = var.spot
    } : "--provider-option ${key}=${value}"],
  ))
}
