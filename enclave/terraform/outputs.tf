output "key_arn" {
  description = "For key_id in the image's manifest, and for attestor encrypt"
  value       = aws_kms_key.secrets.arn
}

output "parent_role_arn" {
  description = "For attestor policy render --principal"
  value       = aws_iam_role.parent.arn
}

output "bucket" {
  description = "Where the ciphertexts go, s3://BUCKET/... in the manifest"
  value       = aws_s3_bucket.enclave.id
}

output "instances" {
  description = "By their node; for attestor policy render --bind"
  value       = { for node, instance in aws_instance.parent : node => instance.id }
}
