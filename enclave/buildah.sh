# shellcheck shell=bash
# What the scripts that build images share: buildah without a daemon, storage of our own, a base that debootstrap makes.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$top/.cache/image
export SOURCE_DATE_EPOCH=0

fail() {
    echo "error: $1" >&2
    exit 2
}

# The architecture of what is made: $arch as Debian names it, this machine's own where nothing is said.
choose_arch() {
    local machine
    arch=${arch:-$(native_arch)}
    case $arch in
        amd64) machine=x86_64 ;;
        arm64) machine=aarch64 ;;
        *) fail "images are for amd64 or arm64, not for $arch" ;;
    esac
    # F: the kernel has the emulator open already, so that it need not be in the root that is made
    [[ $arch == "$(native_arch)" ]] || grep -qs '^flags:.*F' "/proc/sys/fs/binfmt_misc/qemu-$machine" ||
        fail "programs for $arch do not run here (on Debian: apt-get install qemu-user-static binfmt-support)"
}

native_arch() {
    case $(uname -m) in
        x86_64) echo amd64 ;;
        aarch64) echo arm64 ;;
        *) uname -m ;;
    esac
}

need_tools() {
    local tool missing=()
    for tool in buildah debootstrap; do
        type -P "$tool" >/dev/null || missing+=("$tool") # command -v would find the function below
    done
    ((${#missing[@]} == 0)) || fail "missing: ${missing[*]} (on Debian: apt-get install ${missing[*]})"
    ((EUID == 0)) || fail "buildah's chroot isolation and debootstrap want root: run this with sudo"
    choose_arch
    mkdir -p "$cache"
    choose_driver
}

# Storage that is ours alone. vfs needs nothing of the kernel, but copies a whole root for each step.
buildah() {
    command buildah --root "$cache/$driver" --runroot "$cache/run" --storage-driver "$driver" "$@"
}

choose_driver() {
    local try
    try=$(mktemp -d "$cache/try.XXXXXX")
    mkdir "$try/lower" "$try/upper" "$try/work" "$try/root"
    driver=vfs
    if mount -t overlay overlay -o "lowerdir=$try/lower,upperdir=$try/upper,workdir=$try/work" "$try/root" 2>/dev/null; then
        driver=overlay
        umount "$try/root"
    fi
    rm -rf "$try"
}

# The smallest Debian 13, from Debian's archive or the one given, by debootstrap, which checks its signature.
make_base() { # NAME [URL]
    ! buildah inspect "$1" >/dev/null 2>&1 || return 0
    echo "making the base with debootstrap: some minutes, see $cache/debootstrap.log" >&2
    local tree
    tree=$(mktemp -d "$cache/base.XXXXXX")
    debootstrap --arch="$arch" --force-check-gpg --variant=minbase trixie "$tree" "${@:2}" >"$cache/debootstrap.log" 2>&1 ||
        fail "debootstrap failed (without Debian's keys? package debian-archive-keyring): see $cache/debootstrap.log"
    rm -rf "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/*
    local container
    container=$(buildah from scratch)
    buildah config --arch "$arch" "$container"
    buildah add --quiet "$container" "$tree" / >/dev/null
    buildah commit --quiet --rm "$container" "$1" >/dev/null
    rm -rf "$tree"
}

# Steps that were done before are not done again; --no-cache among the arguments does all of them. No label says which
# buildah it was: another one is to make the same image.
build() { # TAG ARGUMENT...
    local tag=$1 ca=${ATTESTOR_BUILD_CA:-/etc/ssl/certs/ca-certificates.crt} secret=()
    shift
    [[ ! -e $ca ]] || secret=(--secret "id=ca,src=$ca")
    echo "building $tag: minutes the first time, see $cache/$tag.log" >&2
    buildah bud --arch "$arch" --isolation chroot --layers --timestamp 0 --identity-label=false "${secret[@]}" --tag "$tag" "$@" "$top" >"$cache/$tag.log" 2>&1 || {
        tail -n 30 "$cache/$tag.log" >&2
        fail "image $tag cannot be built: see $cache/$tag.log"
    }
}

# Forget what the last build of no image made or used, so that the storage does not grow with each change of a source; the
# steps of those builds stay, which makes the next one fast.
prune() {
    local used id name removed=yes
    used=$(sed -n 's/^--> \(Using cache \)\{0,1\}\([0-9a-f]\{10\}\)[0-9a-f]*$/\2/p' "$cache"/*.log | sort -u)
    buildah rm --all >/dev/null
    while [[ -n $removed ]]; do # an image goes after those that were made from it
        removed=''
        while read -r id name; do
            id=${id#sha256:}
            [[ $name == '<none>' ]] || continue
            ! grep -qxF "${id:0:10}" <<<"$used" || continue
            ! buildah rmi "$id" >/dev/null 2>&1 || removed=yes
        done < <(buildah images --all --noheading --no-trunc --format '{{.ID}} {{.Name}}')
    done
    find "$cache" -maxdepth 1 -name '*.??????' \( -name 'base.*' -o -name 'tree.*' -o -name 'try.*' \) -exec rm -rf {} + # of runs that were killed
}

digest() { # TAG
    buildah inspect --type image --format '{{.FromImageDigest}}' "$1"
}

flatten() { # TAG TAR: the root as one archive, the same bytes for the same root
    local container mounted
    container=$(buildah from --quiet "$1")
    mounted=$(buildah mount "$container")
    tar --sort=name --mtime=@0 --numeric-owner --format=posix --pax-option=delete=atime,delete=ctime -C "$mounted" -cf "$2" .
    buildah rm "$container" >/dev/null
}
