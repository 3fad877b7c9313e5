# Letters and digits only, as they stand in addresses. They lie in Terraform's state as well: keep that encrypted and to yourselves.
resource "random_password" "made" {
  for_each = toset(["admin_token", "worker_token", "database", "redis"])
  length   = 48
  special  = false
}

resource "random_id" "secrets_key" {
  byte_length = 32
}

locals {
  broker_url = format(
    "rediss://:%s@%s:6379/0?ssl_cert_reqs=required",
    random_password.made["redis"].result,
    aws_elasticache_replication_group.redis.primary_endpoint_address,
  )
  farm_secret = {
    MILLRACE_DATABASE_URL = format(
      "postgresql+psycopg://millrace:%s@%s:5432/millrace?sslmode=require",
      random_password.made["database"].result,
      aws_db_instance.database.address,
    )
    MILLRACE_BROKER_URL   = local.broker_url
    MILLRACE_TOKEN        = random_password.made["admin_token"].result
    MILLRACE_WORKER_TOKEN = random_password.made["worker_token"].result
    MILLRACE_SECRETS_KEY  = random_id.secrets_key.hex
  }
  worker_secret = {
    MILLRACE_WORKER_TOKEN = random_password.made["worker_token"].result
    MILLRACE_BROKER_URL   = local.broker_url
  }
}

resource "aws_secretsmanager_secret" "admin_token" {
  name_prefix = "${var.farm}-admin-token-"
  description = "The admin token of ${var.farm}, for people: MILLRACE_TOKEN of the command line"
  tags        = local.tags
}

resource "aws_secretsmanager_secret_version" "admin_token" {
  secret_id     = aws_secretsmanager_secret.admin_token.id
  secret_string = random_password.made["admin_token"].result
}

resource "aws_secretsmanager_secret" "farm" {
  name_prefix = "${var.farm}-farm-"
  description = "What API and scheduler of ${var.farm} must know; with the key that opens the secrets of builds in the database"
  tags        = local.tags
}

resource "aws_secretsmanager_secret_version" "farm" {
  secret_id     = aws_secretsmanager_secret.farm.id
  secret_string = jsonencode(local.farm_secret)
}

resource "aws_secretsmanager_secret" "worker" {
  name_prefix = "${var.farm}-worker-"
  description = "What workers of ${var.farm} must know, and all that their hosts may read"
  tags        = local.tags
}

resource "aws_secretsmanager_secret_version" "worker" {
  secret_id     = aws_secretsmanager_secret.worker.id
  secret_string = jsonencode(local.worker_secret)
}
