output "api_url" {
  description = "Where the API is reached (MILLRACE_API_URL), once the domain name points to the load balancer."
  value       = local.api_url
}

output "load_balancer" {
  description = "Where the domain name must point to."
  value       = aws_lb.api.dns_name
}

output "admin_token_secret" {
  description = "Secret that holds the admin token (MILLRACE_TOKEN)."
  value       = aws_secretsmanager_secret.admin_token.arn
}

output "bucket" {
  description = "Where artifacts, logs and caches lie."
  value       = aws_s3_bucket.objects.id
}

output "api_role" {
  description = "Role of the API. Allow it other buckets where projects put their artifacts there."
  value       = aws_iam_role.api.name
}

output "for_fleets" {
  description = "What the modules of fleets want to know, as their variable control_plane."
  value = {
    farm                = var.farm
    vpc_id              = var.vpc_id
    api_url             = local.api_url
    worker_secret       = aws_secretsmanager_secret.worker.arn
    scheduler_role      = aws_iam_role.scheduler.name
    api_role            = aws_iam_role.api.name
    redis_group         = aws_security_group.redis.id
    load_balancer_group = aws_security_group.load_balancer.id
  }
}
