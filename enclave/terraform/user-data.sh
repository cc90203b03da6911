# shellcheck shell=bash disable=SC2154 # main.tf puts lines before this one: region, bucket, cpus, memory, parent_files
# Makes an instance with Amazon Linux 2023 the parent of one enclave. Its output is in /var/log/cloud-init-output.log.
set -euo pipefail

readonly home=/opt/attestor units=/etc/systemd/system

main() {
    dnf install --assumeyes --quiet aws-nitro-enclaves-cli socat
    give_to_enclaves
    fetch
    "$home/parent/configure" "$region"
    install -m 644 "$home"/parent/*.service "$units/"
    unit_of_the_enclave >"$units/attestor-enclave.service"
    systemctl daemon-reload
    systemctl enable --now attestor-vsock@kms attestor-vsock@s3 attestor-vsock@metadata attestor-status
    systemctl enable --now attestor-enclave
}

# The allocator sets memory and CPUs aside, as much as the enclave is to get. The enclave's unit starts it.
give_to_enclaves() {
    printf -- '---\nmemory_mib: %s\ncpu_count: %s\n' "$memory" "$cpus" >/etc/nitro_enclaves/allocator.yaml
    systemctl enable nitro-enclaves-allocator
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

# User data runs at the first boot alone, and this at each, once the allocator has ended. Where that failed, or nitro-cli does,
# both are tried again: "Wants", since a unit that "Requires" what failed is not. What nitro-cli leaves running is the enclave.
unit_of_the_enclave() {
    cat <<UNIT
[Unit]
Description=Enclave
Wants=nitro-enclaves-allocator.service
After=nitro-enclaves-allocator.service attestor-status.service
StartLimitIntervalSec=0

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=$home/parent/run-enclave --cpus $cpus --memory $memory $home/image.eif
Restart=on-failure
RestartSec=10

[Install]
WantedBy=multi-user.target
UNIT
}

main
