variable "name" {
  description = "Of all that is made; the parent's role is NAME-parent"
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,29}$", var.name))
    error_message = "Small letters, digits and hyphens, 2 to 30 of them: it begins the bucket's name."
  }
}

variable "region" {
  description = "Of key, bucket and instances"
  type        = string
  validation {
    condition     = can(regex("^[a-z]{2,8}(-[a-z]{2,16}){1,3}-[0-9]{1,2}$", var.region))
    error_message = "Such as eu-west-1."
  }
}

variable "subnet_id" {
  description = "Where the instances are; they need a way to KMS, S3 and the packages of Amazon Linux"
  type        = string
}

variable "key_policy" {
  description = "File that attestor policy render wrote, and policy check found no fault in"
  type        = string
}

variable "image" {
  description = "Enclave image file (EIF); without one there is no instance yet"
  type        = string
  default     = null
}

variable "nodes" {
  description = "Values of the tag mpa-node, one instance each"
  type        = set(string)
  default     = ["1"]
  validation {
    condition     = alltrue([for node in var.nodes : can(regex("^[A-Za-z0-9._-]{1,64}$", node))])
    error_message = "Letters, digits, dots, underscores and hyphens."
  }
}

variable "architecture" {
  description = "Of instances and image: x86_64 or arm64"
  type        = string
  default     = "x86_64"
  validation {
    condition     = contains(["x86_64", "arm64"], var.architecture)
    error_message = "One of x86_64 and arm64."
  }
}

variable "instance_type" {
  description = "One that takes enclaves, with vCPUs enough for both sides; of arm64, such as m7g.xlarge"
  type        = string
  default     = "m7i.xlarge"
}

variable "enclave_cpus" {
  description = "vCPUs of the enclave, whole cores"
  type        = number
  default     = 2
  validation {
    condition     = var.enclave_cpus >= 1 && floor(var.enclave_cpus) == var.enclave_cpus
    error_message = "A whole number from 1."
  }
}

variable "enclave_memory" {
  description = "Memory of the enclave in MiB: four times the size of the image at least"
  type        = number
  default     = 2048
  validation {
    condition     = var.enclave_memory >= 64 && floor(var.enclave_memory) == var.enclave_memory
    error_message = "A whole number from 64."
  }
}
