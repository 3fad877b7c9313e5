locals {
  account   = data.aws_caller_identity.here.account_id
  partition = data.aws_partition.here.partition
  region    = data.aws_region.here.name
  api_url   = "https://${var.domain_name}"
  tags      = { "millrace:farm" = var.farm }

  environment = [
    { name = "MILLRACE_API_URL", value = local.api_url },
    { name = "MILLRACE_STORE_URL", value = "https://s3.${local.region}.${data.aws_partition.here.dns_suffix}" },
    { name = "MILLRACE_STORE_REGION", value = local.region },
    { name = "MILLRACE_BUCKET", value = aws_s3_bucket.objects.id },
    { name = "MILLRACE_REGION", value = local.region },
    { name = "MILLRACE_ACCOUNT_ID", value = local.account },
  ]
  secrets = { for name in keys(local.farm_secret) : name => { name = name, valueFrom = "${aws_secretsmanager_secret.farm.arn}:${name}::" } }
}

resource "aws_cloudwatch_log_group" "log" {
  name_prefix       = "${var.farm}-farm-"
  retention_in_days = var.log_days
  tags              = local.tags
}

resource "aws_ecs_cluster" "farm" {
  name = "${var.farm}-farm"
  tags = local.tags
}

resource "aws_ecs_task_definition" "api" {
  family                   = "${var.farm}-api"
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = 1024
  memory                   = 2048
  execution_role_arn       = aws_iam_role.execution.arn
  task_role_arn            = aws_iam_role.api.arn
  depends_on               = [aws_secretsmanager_secret_version.farm]
  tags                     = local.tags

  runtime_platform {
    cpu_architecture        = var.architecture
    operating_system_family = "LINUX"
  }

  container_definitions = jsonencode([{
    name      = "api"
    image     = var.image
    essential = true
    user      = "millrace"
    # The schema first: whichever task comes first brings it up to date, under a lock, and the others find it so.
    entryPoint      = ["/bin/sh", "-c"]
    command         = ["millrace bootstrap && exec millrace api"]
    linuxParameters = { initProcessEnabled = true, capabilities = { drop = ["ALL"] } }
    portMappings    = [{ containerPort = 8420, protocol = "tcp" }]
    stopTimeout     = 60
    environment     = concat([{ name = "MILLRACE_BIND", value = "0.0.0.0:8420" }], local.environment)
    secrets         = values(local.secrets)
    logConfiguration = {
      logDriver = "awslogs"
      options = {
        awslogs-group         = aws_cloudwatch_log_group.log.name
        awslogs-region        = local.region
        awslogs-stream-prefix = "api"
      }
    }
  }])
}

resource "aws_ecs_task_definition" "scheduler" {
  family                   = "${var.farm}-scheduler"
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = 512
  memory                   = 1024
  execution_role_arn       = aws_iam_role.execution.arn
  task_role_arn            = aws_iam_role.scheduler.arn
  depends_on               = [aws_secretsmanager_secret_version.farm]
  tags                     = local.tags

  runtime_platform {
    cpu_architecture        = var.architecture
    operating_system_family = "LINUX"
  }

  container_definitions = jsonencode([{
    name            = "scheduler"
    image           = var.image
    essential       = true
    user            = "millrace"
    command         = ["scheduler"]
    linuxParameters = { initProcessEnabled = true, capabilities = { drop = ["ALL"] } }
    stopTimeout     = 60
    environment     = local.environment
    secrets         = [for name in ["MILLRACE_DATABASE_URL", "MILLRACE_BROKER_URL", "MILLRACE_SECRETS_KEY"] : local.secrets[name]]
    logConfiguration = {
      logDriver = "awslogs"
      options = {
        awslogs-group         = aws_cloudwatch_log_group.log.name
        awslogs-region        = local.region
        awslogs-stream-prefix = "scheduler"
      }
    }
  }])
}

resource "aws_ecs_service" "api" {
  name                               = "api"
  cluster                            = aws_ecs_cluster.farm.id
  task_definition                    = aws_ecs_task_definition.api.arn
  launch_type                        = "FARGATE"
  desired_count                      = var.api_tasks
  health_check_grace_period_seconds  = 180
  deployment_minimum_healthy_percent = 100
  deployment_maximum_percent         = 200
  depends_on                         = [aws_lb_listener.https, aws_iam_role_policy.execution]
  tags                               = local.tags

  deployment_circuit_breaker {
    enable   = true
    rollback = true
  }

  network_configuration {
    subnets          = var.private_subnets
    security_groups  = [aws_security_group.farm.id]
    assign_public_ip = false
  }

  load_balancer {
    container_name   = "api"
    container_port   = 8420
    target_group_arn = aws_lb_target_group.api.arn
  }
}

resource "aws_ecs_service" "scheduler" {
  name                               = "scheduler"
  cluster                            = aws_ecs_cluster.farm.id
  task_definition                    = aws_ecs_task_definition.scheduler.arn
  launch_type                        = "FARGATE"
  desired_count                      = var.scheduler_tasks
  deployment_minimum_healthy_percent = 0
  deployment_maximum_percent         = 200
  depends_on                         = [aws_ecs_service.api]
  tags                               = local.tags

  network_configuration {
    subnets          = var.private_subnets
    security_groups  = [aws_security_group.farm.id]
    assign_public_ip = false
  }
}

resource "aws_lb" "api" {
  name                       = "${var.farm}-api"
  load_balancer_type         = "application"
  internal                   = !var.internet_facing
  subnets                    = var.load_balancer_subnets
  security_groups            = [aws_security_group.load_balancer.id]
  idle_timeout               = 60
  drop_invalid_header_fields = true
  enable_deletion_protection = var.protected
  tags                       = local.tags
}

resource "aws_lb_target_group" "api" {
  name                 = "${var.farm}-api"
  vpc_id               = var.vpc_id
  target_type          = "ip"
  protocol             = "HTTP"
  port                 = 8420
  deregistration_delay = 60
  tags                 = local.tags

  health_check {
    path                = "/healthz"
    interval            = 10
    healthy_threshold   = 2
    unhealthy_threshold = 3
  }
}

resource "aws_lb_listener" "https" {
  load_balancer_arn = aws_lb.api.arn
  protocol          = "HTTPS"
  port              = 443
  ssl_policy        = "ELBSecurityPolicy-TLS13-1-2-2021-06"
  certificate_arn   = var.certificate_arn
  tags              = local.tags

  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.api.arn
  }
}
