# A parent instance and what its enclave needs: key, role, bucket, instances. README.md beside this file tells the order of
# steps, and why the key's policy is a file.

terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.40, < 7.0"
    }
  }
}

provider "aws" {
  region = var.region
}

locals {
  key_policy = file(var.key_policy)
  # what runs on the parent; scripts of the build host and the operator stay there
  parent_files = toset([
    "attestor-status.service", "attestor-vsock@.service", "common.sh", "configure", "run-enclave",
  ])
}

# ---- the key

resource "aws_kms_key" "secrets" {
  description             = "${var.name}: secrets that its enclave alone decrypts"
  policy                  = local.key_policy
  enable_key_rotation     = true
  deletion_window_in_days = 30

  # KMS looks for the principals of a policy when it takes it
  depends_on = [aws_iam_role.parent]

  lifecycle {
    prevent_destroy = true # with the key go the secrets
    precondition {
      condition     = strcontains(local.key_policy, "\"${aws_iam_role.parent.arn}\"")
      error_message = "${var.key_policy} does not name ${aws_iam_role.parent.arn}: render it with this --principal."
    }
    precondition {
      condition     = strcontains(local.key_policy, "kms:RecipientAttestation:PCR")
      error_message = "${var.key_policy} asks for no PCR: attestor policy check tells what is wrong with it."
    }
  }
}

resource "aws_kms_alias" "secrets" {
  name          = "alias/${var.name}"
  target_key_id = aws_kms_key.secrets.key_id
}

# ---- the role: it may read the bucket. For KMS it has nothing here: the key's policy names it, and asks for attestation

data "aws_iam_policy_document" "assumed_by_ec2" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "parent" {
  name               = "${var.name}-parent"
  assume_role_policy = data.aws_iam_policy_document.assumed_by_ec2.json
}

data "aws_iam_policy_document" "reads_the_bucket" {
  statement {
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.enclave.arn}/*"]
  }
}

resource "aws_iam_role_policy" "parent" {
  name   = "reads-the-bucket"
  role   = aws_iam_role.parent.id
  policy = data.aws_iam_policy_document.reads_the_bucket.json
}

resource "aws_iam_instance_profile" "parent" {
  name = aws_iam_role.parent.name
  role = aws_iam_role.parent.name
}

# ---- the bucket: ciphertexts, the image, and the scripts of the parent

resource "aws_s3_bucket" "enclave" {
  bucket_prefix = "${var.name}-"
}

resource "aws_s3_bucket_versioning" "enclave" {
  bucket = aws_s3_bucket.enclave.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_public_access_block" "enclave" {
  bucket                  = aws_s3_bucket.enclave.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

data "aws_iam_policy_document" "tls_only" {
  statement {
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.enclave.arn, "${aws_s3_bucket.enclave.arn}/*"]
    principals {
      type        = "*"
      identifiers = ["*"]
    }
    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_s3_bucket_policy" "enclave" {
  bucket     = aws_s3_bucket.enclave.id
  policy     = data.aws_iam_policy_document.tls_only.json
  depends_on = [aws_s3_bucket_public_access_block.enclave]
}

resource "aws_s3_object" "parent" {
  for_each    = local.parent_files
  bucket      = aws_s3_bucket.enclave.id
  key         = "parent/${each.value}"
  source      = "${path.module}/../parent/${each.value}"
  source_hash = filemd5("${path.module}/../parent/${each.value}")
}

resource "aws_s3_object" "image" {
  count       = var.image == null ? 0 : 1
  bucket      = aws_s3_bucket.enclave.id
  key         = "image.eif"
  source      = var.image
  source_hash = filemd5(var.image)
}

# ---- the instances: one for each node, which its enclave reads from the tag

data "aws_subnet" "parent" {
  id = var.subnet_id
}

resource "aws_security_group" "parent" {
  name        = "${var.name}-parent"
  description = "Nobody comes in; HTTPS goes out, to KMS, S3 and the packages of Amazon Linux"
  vpc_id      = data.aws_subnet.parent.vpc_id
}

resource "aws_vpc_security_group_egress_rule" "https" {
  security_group_id = aws_security_group.parent.id
  description       = "HTTPS"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  cidr_ipv4         = "0.0.0.0/0"
}

data "aws_ami" "amazon_linux" {
  owners      = ["amazon"]
  most_recent = true
  filter {
    name   = "name"
    values = ["al2023-ami-2023.*-${var.architecture}"]
  }
}

resource "aws_instance" "parent" {
  for_each               = var.image == null ? toset([]) : var.nodes
  ami                    = data.aws_ami.amazon_linux.id
  instance_type          = var.instance_type
  subnet_id              = var.subnet_id
  vpc_security_group_ids = [aws_security_group.parent.id]
  iam_instance_profile   = aws_iam_instance_profile.parent.name

  # a newer image, or other scripts, make another instance
  user_data_replace_on_change = true
  user_data = join("\n", [
    "#!/usr/bin/env bash",
    "readonly region=${var.region} bucket=${aws_s3_bucket.enclave.id}",
    "readonly cpus=${var.enclave_cpus} memory=${var.enclave_memory} # MiB",
    "readonly parent_files='${join(" ", local.parent_files)}'",
    "# image ${aws_s3_object.image[0].source_hash}, scripts ${md5(join(" ", [for file in aws_s3_object.parent : file.source_hash]))}",
    file("${path.module}/user-data.sh"),
  ])

  enclave_options {
    enabled = true
  }

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required" # IMDSv2
    http_put_response_hop_limit = 1          # the proxy runs on the parent itself
    instance_metadata_tags      = "enabled"
  }

  root_block_device {
    encrypted   = true
    volume_type = "gp3"
  }

  tags = {
    Name       = "${var.name}-${each.value}"
    "mpa-node" = each.value
  }

  # user data fetches from the bucket, over HTTPS, and is not repeated
  depends_on = [aws_iam_role_policy.parent, aws_vpc_security_group_egress_rule.https]

  lifecycle {
    ignore_changes = [ami] # Amazon's newest is for new instances
  }
}
