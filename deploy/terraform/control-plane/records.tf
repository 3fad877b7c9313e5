resource "aws_db_subnet_group" "database" {
  name_prefix = "${var.farm}-"
  description = "${var.farm}: PostgreSQL"
  subnet_ids  = var.private_subnets
  tags        = local.tags
}

resource "aws_db_instance" "database" {
  identifier_prefix          = "${var.farm}-"
  engine                     = "postgres"
  engine_version             = "17"
  instance_class             = var.database_class
  db_name                    = "millrace"
  username                   = "millrace"
  password                   = random_password.made["database"].result
  allocated_storage          = var.database_gigabytes
  max_allocated_storage      = 1000
  storage_type               = "gp3"
  storage_encrypted          = true
  multi_az                   = var.standby
  publicly_accessible        = false
  db_subnet_group_name       = aws_db_subnet_group.database.name
  vpc_security_group_ids     = [aws_security_group.database.id]
  backup_retention_period    = var.backup_days
  copy_tags_to_snapshot      = true
  deletion_protection        = var.protected
  auto_minor_version_upgrade = true
  skip_final_snapshot        = false
  final_snapshot_identifier  = "${var.farm}-last"
  tags                       = local.tags
}

resource "aws_elasticache_subnet_group" "redis" {
  name        = "${var.farm}-redis"
  description = "${var.farm}: Redis"
  subnet_ids  = var.private_subnets
  tags        = local.tags
}

resource "aws_elasticache_parameter_group" "redis" {
  name        = "${var.farm}-redis"
  family      = "redis7"
  description = "${var.farm}: never forget a message to make room for another"
  tags        = local.tags

  parameter {
    name  = "maxmemory-policy"
    value = "noeviction"
  }
}

resource "aws_elasticache_replication_group" "redis" {
  replication_group_id       = "${var.farm}-bell"
  description                = "${var.farm}: the bell"
  engine                     = "redis"
  engine_version             = "7.1"
  node_type                  = var.redis_node_type
  parameter_group_name       = aws_elasticache_parameter_group.redis.name
  subnet_group_name          = aws_elasticache_subnet_group.redis.name
  security_group_ids         = [aws_security_group.redis.id]
  num_cache_clusters         = var.standby ? 2 : 1
  automatic_failover_enabled = var.standby
  multi_az_enabled           = var.standby
  at_rest_encryption_enabled = true
  transit_encryption_enabled = true
  auth_token                 = random_password.made["redis"].result
  tags                       = local.tags
}
