# shellcheck shell=bash disable=SC2154 # main.tf puts lines before this one: region, bucket, cpus, memory, parent_files
# Makes an instance with Amazon Linux 2023 the parent of one enclave. Its output is in /var/log/cloud-init-output.log.
set -euo pipefail

readonly home=/opt/attestor boot=/var/lib/cloud/scripts/per-boot/50-enclave

main() {
    dnf install --assumeyes --quiet aws-nitro-enclaves-cli socat
    give_to_enclaves
    fetch
    "$home/parent/configure" "$region"
    install -m 644 "$home"/parent/*.service /etc/systemd/system/
    systemctl daemon-reload
    systemctl enable --now attestor-vsock@kms attestor-vsock@s3 attestor-vsock@metadata attestor-status
    start_at_each_boot
}

# The allocator sets memory and CPUs aside, as much as the enclave is to get.
give_to_enclaves() {
    printf -- '---\nmemory_mib: %s\ncpu_count: %s\n' "$memory" "$cpus" >/etc/nitro_enclaves/allocator.yaml
    systemctl enable --now nitro-enclaves-allocator
}

fetch() {
    local file
    mkdir -p "$home/parent"
    for file in $parent_files; do
        aws s3 cp --region "$region" --only-show-errors "s3://$bucket/parent/$file" "$home/parent/$file"
    done
    chmod 755 "$home/parent/configure" "$home/parent/run-enclave"
    aws s3 cp --region "$region" --only-show-errors "s3://$bucket/image.eif" "$home/image.eif"
}

# cloud-init runs user data at the first boot alone, and what is in this folder at each; at the first, that was earlier.
start_at_each_boot() {
    printf '#!/bin/sh\nexec %s --cpus %s --memory %s %s\n' "$home/parent/run-enclave" "$cpus" "$memory" "$home/image.eif" >"$boot"
    chmod 755 "$boot"
    "$boot"
}

main
