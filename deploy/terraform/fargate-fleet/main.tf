data "aws_caller_identity" "here" {}
data "aws_partition" "here" {}
data "aws_region" "here" {}

locals {
  account   = data.aws_caller_identity.here.account_id
  partition = data.aws_partition.here.partition
  region    = data.aws_region.here.name
  name      = "${var.control_plane.farm}-${var.fleet}"
  tags      = { "millrace:farm" = var.control_plane.farm, "millrace:fleet" = var.fleet }
  ecs       = "arn:${local.partition}:ecs:${local.region}:${local.account}"
  # What the scheduler makes of the template, and nothing else.
  made = "${local.ecs}:task-definition/${local.name}-mr-*:*"
  log = { for name in ["bundle", "build"] : name => {
    logDriver = "awslogs"
    options = {
      awslogs-group         = aws_cloudwatch_log_group.log.name
      awslogs-region        = local.region
      awslogs-stream-prefix = name
    }
  } }
}

# Who reaches whom: nobody a task.

resource "aws_security_group" "workers" {
  name_prefix = "${local.name}-"
  description = "${var.control_plane.farm}, fleet ${var.fleet}: nothing comes in"
  vpc_id      = var.control_plane.vpc_id
  tags        = merge(local.tags, { Name = local.name })
}

resource "aws_vpc_security_group_egress_rule" "out" {
  for_each          = { "API, S3, registries, git servers" = 443, "packages" = 80, "git servers over ssh" = 22 }
  security_group_id = aws_security_group.workers.id
  description       = each.key
  ip_protocol       = "tcp"
  from_port         = each.value
  to_port           = each.value
  cidr_ipv4         = "0.0.0.0/0"
}

resource "aws_vpc_security_group_ingress_rule" "api" {
  security_group_id            = var.control_plane.load_balancer_group
  description                  = "workers"
  ip_protocol                  = "tcp"
  from_port                    = 443
  to_port                      = 443
  referenced_security_group_id = aws_security_group.workers.id
}

# What they may do.

data "aws_iam_policy_document" "tasks" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ecs-tasks.amazonaws.com"]
    }

    condition {
      test     = "StringEquals"
      variable = "aws:SourceAccount"
      values   = [local.account]
    }
  }
}

# For ECS, not for the task: to fetch images and the worker's token, and to write the log.
data "aws_iam_policy_document" "start" {
  statement {
    sid       = "ReadOneSecret"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [var.control_plane.worker_secret]
  }

  statement {
    sid       = "WriteTheLog"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${aws_cloudwatch_log_group.log.arn}:*"]
  }

  statement {
    sid       = "FetchImages"
    actions   = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"]
    resources = ["arn:${local.partition}:ecr:${local.region}:${local.account}:repository/*"]
  }

  statement {
    sid       = "LogInToEcr"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"]
  }
}

resource "aws_iam_role" "execution" {
  name_prefix        = "millrace-tasks-"
  assume_role_policy = data.aws_iam_policy_document.tasks.json
  tags               = local.tags
}

resource "aws_iam_role_policy" "execution" {
  name   = "start"
  role   = aws_iam_role.execution.id
  policy = data.aws_iam_policy_document.start.json
}

data "aws_iam_policy_document" "scheduler" {
  statement {
    sid       = "RunBuildsHere"
    actions   = ["ecs:RunTask"]
    resources = [local.made]

    condition {
      test     = "ArnEquals"
      variable = "ecs:cluster"
      values   = [aws_ecs_cluster.fleet.arn]
    }
  }

  statement {
    sid       = "TagThem"
    actions   = ["ecs:TagResource"]
    resources = ["${local.ecs}:task/${aws_ecs_cluster.fleet.name}/*"]

    condition {
      test     = "StringEquals"
      variable = "ecs:CreateAction"
      values   = ["RunTask"]
    }
  }

  statement {
    sid       = "SeeAndEndThem"
    actions   = ["ecs:DescribeTasks", "ecs:StopTask"]
    resources = ["${local.ecs}:task/${aws_ecs_cluster.fleet.name}/*"]
  }

  statement {
    sid       = "ListThem"
    actions   = ["ecs:ListTasks"]
    resources = ["*"]

    condition {
      test     = "ArnEquals"
      variable = "ecs:cluster"
      values   = [aws_ecs_cluster.fleet.arn]
    }
  }

  statement {
    sid       = "SeeTheCluster"
    actions   = ["ecs:DescribeClusters"]
    resources = [aws_ecs_cluster.fleet.arn]
  }

  statement {
    sid       = "MakeDefinitions"
    actions   = ["ecs:RegisterTaskDefinition"]
    resources = [local.made]
  }

  statement {
    sid       = "LookThroughDefinitions"
    actions   = ["ecs:DescribeTaskDefinition", "ecs:ListTaskDefinitionFamilies", "ecs:ListTaskDefinitions"]
    resources = ["*"]
  }

  # AWS knows no narrower one. It ends no task.
  statement {
    sid       = "ForgetDefinitions"
    actions   = ["ecs:DeregisterTaskDefinition"]
    resources = ["*"]
  }

  statement {
    sid       = "HandOverTheirRoles"
    actions   = ["iam:PassRole"]
    resources = compact([aws_iam_role.execution.arn, var.build_role_arn])

    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ecs-tasks.amazonaws.com"]
    }
  }
}

resource "aws_iam_role_policy" "scheduler" {
  name   = "fargate-fleet-${var.fleet}"
  role   = var.control_plane.scheduler_role
  policy = data.aws_iam_policy_document.scheduler.json
}

data "aws_iam_policy_document" "api" {
  statement {
    sid       = "LookAtTheClusterBeforeItIsSet"
    actions   = ["ecs:DescribeClusters"]
    resources = [aws_ecs_cluster.fleet.arn]
  }

  statement {
    sid       = "LookBeforeItIsSet"
    actions   = ["ecs:DescribeTaskDefinition"]
    resources = ["*"]
  }
}

resource "aws_iam_role_policy" "api" {
  name   = "fargate-fleet-${var.fleet}"
  role   = var.control_plane.api_role
  policy = data.aws_iam_policy_document.api.json
}

# The cluster, and what a task is like.

resource "aws_cloudwatch_log_group" "log" {
  name_prefix       = "${local.name}-"
  retention_in_days = var.log_days
  tags              = local.tags
}

resource "aws_ecs_cluster" "fleet" {
  name = local.name
  tags = local.tags
}

resource "aws_ecs_cluster_capacity_providers" "fleet" {
  cluster_name       = aws_ecs_cluster.fleet.name
  capacity_providers = ["FARGATE", "FARGATE_SPOT"]
}

# A template: the scheduler makes others of it, with the build's image, CPU and memory.
resource "aws_ecs_task_definition" "template" {
  family                   = local.name
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = 1024
  memory                   = 2048
  execution_role_arn       = aws_iam_role.execution.arn
  task_role_arn            = var.build_role_arn
  tags                     = local.tags

  ephemeral_storage {
    size_in_gib = var.disk_gigabytes
  }

  runtime_platform {
    cpu_architecture        = var.architecture
    operating_system_family = "LINUX"
  }

  volume {
    name = "bundle"
  }

  container_definitions = jsonencode([
    {
      name                   = "bundle"
      image                  = var.bundle_image
      essential              = false
      memoryReservation      = 32
      readonlyRootFilesystem = true
      mountPoints            = [{ sourceVolume = "bundle", containerPath = "/millrace" }]
      logConfiguration       = local.log["bundle"]
    },
    {
      name = "build"
      # Any image: each build comes with its own.
      image       = var.bundle_image
      essential   = true
      entryPoint  = ["/millrace/millrace", "worker", "--once"]
      dependsOn   = [{ containerName = "bundle", condition = "SUCCESS" }]
      mountPoints = [{ sourceVolume = "bundle", containerPath = "/millrace", readOnly = true }]
      stopTimeout = 120
      environment = [
        { name = "MILLRACE_API_URL", value = var.control_plane.api_url },
        { name = "MILLRACE_FLEET", value = var.fleet },
        { name = "MILLRACE_LOG_FORMAT", value = "json" },
      ]
      secrets          = [{ name = "MILLRACE_WORKER_TOKEN", valueFrom = "${var.control_plane.worker_secret}:MILLRACE_WORKER_TOKEN::" }]
      logConfiguration = local.log["build"]
    },
  ])
}
