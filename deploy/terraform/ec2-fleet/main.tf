data "aws_caller_identity" "here" {}
data "aws_partition" "here" {}
data "aws_region" "here" {}

data "aws_ssm_parameter" "machine_image" {
  name = var.machine_image
}

locals {
  account   = data.aws_caller_identity.here.account_id
  partition = data.aws_partition.here.partition
  region    = data.aws_region.here.name
  suffix    = data.aws_partition.here.dns_suffix
  name      = "${var.control_plane.farm}-${var.fleet}"
  tags      = { "millrace:farm" = var.control_plane.farm, "millrace:fleet" = var.fleet }
  group_arn = "arn:${local.partition}:autoscaling:${local.region}:${local.account}:autoScalingGroup:*:autoScalingGroupName/${aws_autoscaling_group.fleet.name}"
}

# Who reaches whom: nobody an instance.

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

resource "aws_vpc_security_group_egress_rule" "bell" {
  security_group_id            = aws_security_group.workers.id
  description                  = "the bell"
  ip_protocol                  = "tcp"
  from_port                    = 6379
  to_port                      = 6379
  referenced_security_group_id = var.control_plane.redis_group
}

resource "aws_vpc_security_group_ingress_rule" "farm" {
  for_each                     = { redis_group = 6379, load_balancer_group = 443 }
  security_group_id            = var.control_plane[each.key]
  description                  = "workers"
  ip_protocol                  = "tcp"
  from_port                    = each.value
  to_port                      = each.value
  referenced_security_group_id = aws_security_group.workers.id
}

# What they may do.

data "aws_iam_policy_document" "instances" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.${local.suffix}"]
    }
  }
}

data "aws_iam_policy_document" "worker" {
  statement {
    sid       = "ReadOneSecret"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [var.control_plane.worker_secret]
  }

  statement {
    sid       = "FetchTheImage"
    actions   = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"]
    resources = ["arn:${local.partition}:ecr:${local.region}:${local.account}:repository/*"]
  }

  statement {
    sid       = "LogInToEcr"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"]
  }

  statement {
    sid       = "WriteTheLog"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${aws_cloudwatch_log_group.log.arn}:*"]
  }
}

resource "aws_iam_role" "worker" {
  name_prefix        = "millrace-worker-"
  assume_role_policy = data.aws_iam_policy_document.instances.json
  tags               = local.tags
}

resource "aws_iam_role_policy" "worker" {
  name   = "worker"
  role   = aws_iam_role.worker.id
  policy = data.aws_iam_policy_document.worker.json
}

resource "aws_iam_instance_profile" "worker" {
  name_prefix = "millrace-worker-"
  role        = aws_iam_role.worker.name
  tags        = local.tags
}

data "aws_iam_policy_document" "scheduler" {
  statement {
    sid = "SizeThisGroup"
    actions = [
      "autoscaling:SetDesiredCapacity",
      "autoscaling:SetInstanceProtection",
      "autoscaling:TerminateInstanceInAutoScalingGroup",
      "autoscaling:CompleteLifecycleAction",
    ]
    resources = [local.group_arn]
  }

  statement {
    sid       = "MarkItsGeneration"
    actions   = ["autoscaling:CreateOrUpdateTags"]
    resources = [local.group_arn]

    condition {
      test     = "ForAllValues:StringEquals"
      variable = "aws:TagKeys"
      values   = ["millrace:generation"]
    }
  }

  statement {
    sid = "Look"
    actions = [
      "autoscaling:DescribeAutoScalingGroups",
      "autoscaling:DescribeLifecycleHooks",
      "autoscaling:DescribeScalingActivities",
      "ec2:DescribeInstances",
      "ec2:DescribeLaunchTemplateVersions",
    ]
    resources = ["*"]
  }
}

resource "aws_iam_role_policy" "scheduler" {
  name   = "ec2-fleet-${var.fleet}"
  role   = var.control_plane.scheduler_role
  policy = data.aws_iam_policy_document.scheduler.json
}

data "aws_iam_policy_document" "api" {
  statement {
    sid       = "LookBeforeItIsSet"
    actions   = ["autoscaling:DescribeAutoScalingGroups", "ec2:DescribeLaunchTemplateVersions"]
    resources = ["*"]
  }
}

resource "aws_iam_role_policy" "api" {
  name   = "ec2-fleet-${var.fleet}"
  role   = var.control_plane.api_role
  policy = data.aws_iam_policy_document.api.json
}

# The group.

resource "aws_cloudwatch_log_group" "log" {
  name_prefix       = "${local.name}-"
  retention_in_days = var.log_days
  tags              = local.tags
}

resource "aws_launch_template" "worker" {
  name_prefix                          = "${local.name}-"
  image_id                             = data.aws_ssm_parameter.machine_image.value
  instance_type                        = var.instance_types[0]
  instance_initiated_shutdown_behavior = "terminate"
  update_default_version               = true
  tags                                 = local.tags

  iam_instance_profile {
    arn = aws_iam_instance_profile.worker.arn
  }

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    http_protocol_ipv6          = "disabled"
    instance_metadata_tags      = "enabled"
  }

  network_interfaces {
    device_index                = 0
    associate_public_ip_address = false
    delete_on_termination       = true
    security_groups             = [aws_security_group.workers.id]
  }

  block_device_mappings {
    device_name = var.root_device

    ebs {
      volume_type           = "gp3"
      volume_size           = var.disk_gigabytes
      encrypted             = true
      delete_on_termination = true
    }
  }

  dynamic "tag_specifications" {
    for_each = ["instance", "volume"]

    content {
      resource_type = tag_specifications.value
      tags          = merge(local.tags, { Name = local.name })
    }
  }

  user_data = base64encode(join("\n", [
    "#!/bin/bash",
    "export AWS_REGION='${local.region}' AWS_URL_SUFFIX='${local.suffix}'",
    "export WORKER_SECRET='${var.control_plane.worker_secret}' WORKER_IMAGE='${var.image}' LOG_GROUP='${aws_cloudwatch_log_group.log.name}'",
    "export BUILDS_REACH='${var.builds_reach}'",
    "export MILLRACE_FLEET='${var.fleet}' MILLRACE_API_URL='${var.control_plane.api_url}'",
    "export MILLRACE_SLOTS='${var.slots}' MILLRACE_DRAIN_S='${var.drain_seconds}'",
    file("${path.module}/../../user-data.sh"),
  ]))
}

resource "aws_autoscaling_group" "fleet" {
  name_prefix               = "${local.name}-"
  min_size                  = 0
  max_size                  = var.most_instances
  vpc_zone_identifier       = var.subnets
  health_check_type         = "EC2"
  health_check_grace_period = 300
  # None of them is ended but by the scheduler, after its worker has left; nor moved to balance the zones.
  protect_from_scale_in = true
  suspended_processes   = ["AZRebalance"]

  mixed_instances_policy {
    launch_template {
      launch_template_specification {
        launch_template_id = aws_launch_template.worker.id
        version            = aws_launch_template.worker.latest_version
      }

      dynamic "override" {
        for_each = var.instance_types

        content {
          instance_type = override.value
        }
      }
    }

    instances_distribution {
      on_demand_base_capacity                  = var.on_demand_base
      on_demand_percentage_above_base_capacity = var.on_demand_percent
      on_demand_allocation_strategy            = "prioritized"
      spot_allocation_strategy                 = "price-capacity-optimized"
    }
  }

  # Whoever ends an instance but the scheduler, its worker has so long to hand its builds back.
  initial_lifecycle_hook {
    name                 = "hand-back"
    lifecycle_transition = "autoscaling:EC2_INSTANCE_TERMINATING"
    heartbeat_timeout    = 120
    default_result       = "CONTINUE"
  }

  dynamic "tag" {
    for_each = local.tags

    content {
      key                 = tag.key
      value               = tag.value
      propagate_at_launch = true
    }
  }

  lifecycle {
    # How many there are, and of which generation, the farm's scheduler says.
    ignore_changes = [desired_capacity, tag]
  }
}
