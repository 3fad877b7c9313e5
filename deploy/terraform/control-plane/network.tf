resource "aws_security_group" "load_balancer" {
  name_prefix = "${var.farm}-balancer-"
  description = "${var.farm}: load balancer of the API"
  vpc_id      = var.vpc_id
  tags        = merge(local.tags, { Name = "${var.farm}-balancer" })
}

resource "aws_security_group" "farm" {
  name_prefix = "${var.farm}-farm-"
  description = "${var.farm}: API and scheduler"
  vpc_id      = var.vpc_id
  tags        = merge(local.tags, { Name = "${var.farm}-farm" })
}

resource "aws_security_group" "database" {
  name_prefix = "${var.farm}-database-"
  description = "${var.farm}: PostgreSQL"
  vpc_id      = var.vpc_id
  tags        = merge(local.tags, { Name = "${var.farm}-database" })
}

# Fleets open it to their own workers.
resource "aws_security_group" "redis" {
  name_prefix = "${var.farm}-redis-"
  description = "${var.farm}: Redis"
  vpc_id      = var.vpc_id
  tags        = merge(local.tags, { Name = "${var.farm}-redis" })
}

resource "aws_vpc_security_group_ingress_rule" "clients" {
  for_each          = toset(var.client_cidrs)
  security_group_id = aws_security_group.load_balancer.id
  description       = "clients"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  cidr_ipv4         = strcontains(each.value, ":") ? null : each.value
  cidr_ipv6         = strcontains(each.value, ":") ? each.value : null
}

locals {
  # From one group to a port of another, and nothing else.
  ways = {
    api      = { from = aws_security_group.load_balancer.id, to = aws_security_group.farm.id, port = 8420 }
    database = { from = aws_security_group.farm.id, to = aws_security_group.database.id, port = 5432 }
    redis    = { from = aws_security_group.farm.id, to = aws_security_group.redis.id, port = 6379 }
  }
}

resource "aws_vpc_security_group_egress_rule" "way" {
  for_each                     = local.ways
  security_group_id            = each.value.from
  description                  = each.key
  ip_protocol                  = "tcp"
  from_port                    = each.value.port
  to_port                      = each.value.port
  referenced_security_group_id = each.value.to
}

resource "aws_vpc_security_group_ingress_rule" "way" {
  for_each                     = local.ways
  security_group_id            = each.value.to
  description                  = each.key
  ip_protocol                  = "tcp"
  from_port                    = each.value.port
  to_port                      = each.value.port
  referenced_security_group_id = each.value.from
}

resource "aws_vpc_security_group_egress_rule" "out" {
  for_each          = { "S3, AWS, git servers" = 443, "git servers over ssh" = 22 }
  security_group_id = aws_security_group.farm.id
  description       = each.key
  ip_protocol       = "tcp"
  from_port         = each.value
  to_port           = each.value
  cidr_ipv4         = "0.0.0.0/0"
}
