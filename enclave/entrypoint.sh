#!/bin/sh
# The enclave's first program: from nothing to secrets in place, then the program that waits for them.
#
#   entrypoint [PROGRAM ARG...]
#
# The steps stand at the end, in order. Each says one line on stderr, and tells the parent one JSON line over vsock if
# ATTESTOR_STATUS_PORT is set. A step that ends with 5 (try again) is tried again, with growing pauses, until
# ATTESTOR_DEADLINE; every other status but 0 ends the entrypoint with that status.
#
# With ATTESTOR_WATCH=SECONDS attestor stays as the first process, fetches again so often, and restarts or signals the program
# as the manifest says; it calls this script with --become PROGRAM ARG... for each start.
#
# Settings come from the environment, then from the file ATTESTOR_CONFIG (lines NAME=VALUE, # begins a comment), then
# from the defaults in `configuration`. The parent's claims, region and node, are checked before anything uses them.
set -eu

_SETTINGS="ATTESTOR_PARENT_CID ATTESTOR_NETWORK ATTESTOR_KMS_PORT ATTESTOR_S3_PORT ATTESTOR_METADATA_PORT \
ATTESTOR_STATUS_PORT ATTESTOR_HOSTS ATTESTOR_DNS_SUFFIX ATTESTOR_NODE_TAG ATTESTOR_NODE_VARIABLE ATTESTOR_MANIFEST \
ATTESTOR_SECRETS ATTESTOR_USER ATTESTOR_DEADLINE ATTESTOR_WATCH AWS_REGION"
_REGION='[a-z]{2,8}(-[a-z]{2,16}){1,3}-[0-9]{1,2}'
_HOST='[A-Za-z0-9][A-Za-z0-9.-]*'
_NUMBER='[1-9][0-9]{0,9}'
_NEWLINE='
'

# -- configuration

configuration() {
    setting ATTESTOR_CONFIG /etc/attestor/enclave.conf
    [ ! -e "$ATTESTOR_CONFIG" ] || settings_of_file
    setting ATTESTOR_PARENT_CID 3
    setting ATTESTOR_NETWORK vsock
    setting ATTESTOR_KMS_PORT 8000
    setting ATTESTOR_S3_PORT 8001
    setting ATTESTOR_METADATA_PORT 8002
    setting ATTESTOR_STATUS_PORT 8003
    setting ATTESTOR_HOSTS ''
    setting ATTESTOR_DNS_SUFFIX ''
    setting ATTESTOR_NODE_VARIABLE NODE
    setting ATTESTOR_MANIFEST /etc/attestor/manifest.toml
    setting ATTESTOR_NODE_TAG "$(default_node_tag)"
    setting ATTESTOR_SECRETS /run/secrets
    setting ATTESTOR_USER app
    setting ATTESTOR_DEADLINE 300
    setting ATTESTOR_WATCH ''
    checked_settings
}

default_node_tag() { # none where the manifest has no such variable: an instance without the tag serves it as well
    ! grep -qwF -e "$ATTESTOR_NODE_VARIABLE" "$ATTESTOR_MANIFEST" 2>/dev/null || echo mpa-node
}

setting() { # NAME VALUE: unless it has a value already, an empty one too
    eval "[ \"\${$1+set}\" = set ]" || export "$1=$2" # a name of ours, so nothing else is evaluated
}

settings_of_file() { # never run as a script
    while IFS= read -r line || [ -n "$line" ]; do
        name=${line%%=*}
        case $line in
            '' | '#'*) continue ;;
            *=*) check "$ATTESTOR_CONFIG: name" '[A-Z0-9_]+' "$name" ;;
            *) wrong "$ATTESTOR_CONFIG: a line is not NAME=VALUE" ;;
        esac
        case " $_SETTINGS " in
            *" $name "*) setting "$name" "${line#*=}" ;;
            *) wrong "$ATTESTOR_CONFIG: $name is not known" ;;
        esac
    done <"$ATTESTOR_CONFIG"
}

checked_settings() {
    check ATTESTOR_NETWORK 'vsock|socat|none' "$ATTESTOR_NETWORK"
    check ATTESTOR_PARENT_CID "$_NUMBER" "$ATTESTOR_PARENT_CID"
    check ATTESTOR_KMS_PORT "$_NUMBER" "$ATTESTOR_KMS_PORT"
    check ATTESTOR_S3_PORT "$_NUMBER" "$ATTESTOR_S3_PORT"
    check ATTESTOR_METADATA_PORT "$_NUMBER" "$ATTESTOR_METADATA_PORT"
    check ATTESTOR_STATUS_PORT "($_NUMBER)?" "$ATTESTOR_STATUS_PORT"
    check ATTESTOR_HOSTS "($_HOST=$_NUMBER( +|$))*" "$ATTESTOR_HOSTS"
    check ATTESTOR_DNS_SUFFIX "($_HOST)?" "$ATTESTOR_DNS_SUFFIX"
    check ATTESTOR_NODE_TAG '[A-Za-z0-9+=.,_:@-]{0,128}' "$ATTESTOR_NODE_TAG"
    check ATTESTOR_NODE_VARIABLE '[A-Z][A-Z0-9_]{0,63}' "$ATTESTOR_NODE_VARIABLE" # the script's own begin otherwise
    check ATTESTOR_MANIFEST '/.*' "$ATTESTOR_MANIFEST"
    check ATTESTOR_SECRETS '/.*[^/]' "$ATTESTOR_SECRETS"
    check ATTESTOR_USER '[a-z_][a-z0-9_-]{0,31}' "$ATTESTOR_USER"
    check ATTESTOR_DEADLINE '[0-9]{1,6}' "$ATTESTOR_DEADLINE"
    check ATTESTOR_WATCH '([1-9][0-9]{0,4})?' "$ATTESTOR_WATCH"
    [ "${ATTESTOR_WATCH:-1}" -le 86400 ] || wrong "ATTESTOR_WATCH is more than a day, 86400"
    case $ATTESTOR_NODE_VARIABLE in
        PATH | HOME | IFS | ENV | LD_* | PYTHON* | AWS_* | ATTESTOR_* | NSM_* | SSL* | OPENSSL_* | GLIBC_* | *_PROXY | \
            HOSTALIASES)
            wrong "ATTESTOR_NODE_VARIABLE $ATTESTOR_NODE_VARIABLE steers programs" ;;
    esac
    [ "$(id -u "$ATTESTOR_USER" 2>/dev/null || echo 0)" != 0 ] ||
        wrong "ATTESTOR_USER $ATTESTOR_USER is not known, or root"
}

check() { # NAME PATTERN VALUE
    matches "$3" "$2" || wrong "$1 is not what it must be: $2"
}

matches() { # VALUE PATTERN: all of it, which is one line
    case $1 in *"$_NEWLINE"*) return 1 ;; esac
    grep -Eqx -e "$2" <<VALUE
$1
VALUE
}

wrong() { # MESSAGE: status 2, which another attempt does not change
    say "error: $1"
    return 2
}

# -- steps

network() {
    [ "$ATTESTOR_NETWORK" != none ] || return 0
    ip link set dev lo up || return 2
    [ "$ATTESTOR_NETWORK" = socat ] || return 0
    ip address add 169.254.169.254/32 dev lo || return 2
    forward 169.254.169.254 80 "$ATTESTOR_METADATA_PORT" || return
    forward 127.0.0.1 443 "$ATTESTOR_KMS_PORT" || return
    forward 127.0.0.2 443 "$ATTESTOR_S3_PORT" || return
    last=2
    for host in $ATTESTOR_HOSTS; do
        last=$((last + 1))
        forward "127.0.0.$last" 443 "${host#*=}" || return
        name_host "127.0.0.$last" "${host%%=*}" || return
    done
}

forward() { # ADDRESS PORT VSOCK_PORT: returns when it listens
    socat "TCP4-LISTEN:$2,bind=$1,fork,reuseaddr,backlog=64" "VSOCK-CONNECT:$ATTESTOR_PARENT_CID:$3" &
    tries=100
    until listens "$1.$2"; do
        tries=$((tries - 1))
        { [ $tries -gt 0 ] && kill -0 $! 2>/dev/null; } || wrong "socat does not listen on $1:$2" || return
        sleep 0.1
    done
}

listens() { # A.B.C.D.PORT, as /proc/net/tcp has it: in hexadecimal, the address backwards; 0A is TCP_LISTEN
    echo "$1" | awk -F. '{ printf " %02X%02X%02X%02X:%04X 00000000:0000 0A ", $4, $3, $2, $1, $5 }' |
        grep -q -f - /proc/net/tcp
}

name_host() { # ADDRESS NAME
    echo "$1 $2" >>/etc/hosts || return 2
}

module() {
    attestor describe --json >"$work/module.json"
}

region() {
    [ -n "${AWS_REGION:-}" ] || AWS_REGION=$(metadata placement/region) || return
    check region "$_REGION" "$AWS_REGION" || return
    export AWS_REGION
    [ "$ATTESTOR_NETWORK" = socat ] || return 0
    name_host 127.0.0.1 "kms.$AWS_REGION.$(dns_suffix)" &&
        name_host 127.0.0.2 "s3.$AWS_REGION.$(dns_suffix)"
}

dns_suffix() {
    case $ATTESTOR_DNS_SUFFIX,$AWS_REGION in
        ,cn-*) echo amazonaws.com.cn ;;
        ,eusc-*) echo amazonaws.eu ;;
        ,*) echo amazonaws.com ;;
        *) echo "$ATTESTOR_DNS_SUFFIX" ;;
    esac
}

node() {
    [ -n "$ATTESTOR_NODE_TAG" ] || return 0
    value=$(metadata "tags/instance/$ATTESTOR_NODE_TAG") || return
    check "tag $ATTESTOR_NODE_TAG" '[A-Za-z0-9._-]{1,64}' "$value" || return
    export "$ATTESTOR_NODE_VARIABLE=$value"
}

metadata() { # PATH
    [ "$ATTESTOR_NETWORK" != vsock ] || set -- --imds-vsock "$ATTESTOR_PARENT_CID:$ATTESTOR_METADATA_PORT" "$1"
    attestor metadata "$@"
}

inject() {
    result=0
    call_inject command --receipt "$work/receipt.json" "$ATTESTOR_MANIFEST" 2>"$work/messages" || result=$?
    cat "$work/messages" >&2
    return $result
}

call_inject() { # command|exec ARGUMENT...
    how=$1
    shift
    [ "$ATTESTOR_NETWORK" != vsock ] || set -- --vsock "$ATTESTOR_PARENT_CID:$ATTESTOR_KMS_PORT" \
        --imds-vsock "$ATTESTOR_PARENT_CID:$ATTESTOR_METADATA_PORT" \
        --s3-vsock "$ATTESTOR_PARENT_CID:$ATTESTOR_S3_PORT" "$@"
    $how attestor inject "$@"
}

# -- running and telling

step() { # NAME: until it is done or has failed
    attempt=1
    pause=1
    while status=0 && { "$1" || status=$?; } && tell "$1" "$status" "$attempt" && [ "$status" -eq 5 ]; do
        left=$((deadline - $(uptime_seconds)))
        [ "$left" -gt 0 ] || break
        sleep $((pause < left ? pause : left))
        attempt=$((attempt + 1))
        pause=$((pause < 15 ? pause * 2 : 30))
    done
    return "$status"
}

uptime_seconds() { # a clock that nobody sets
    sed 's/\..*//' /proc/uptime
}

tell() { # STEP STATUS ATTEMPT
    if [ "$2" -eq 0 ]; then say "$1: ok"; else say "$1: status $2, attempt $3"; fi
    [ -z "$ATTESTOR_STATUS_PORT" ] || PATH=$PATH:/usr/local/lib/attestor tell-parent \
        "$ATTESTOR_PARENT_CID:$ATTESTOR_STATUS_PORT" "step=$1" "status=$2" "attempt=$3" \
        --evidence "$work/module.json" --evidence "$work/receipt.json" --messages "$work/messages" || true
}

say() {
    echo "entrypoint: $1" >&2
}

# Before anything else: what cannot be started needs no secrets.
find_program() { # PROGRAM
    which "$1" >/dev/null && return # not `command -v`, which finds functions here, and files without the x bit
    [ -e "$1" ] && status=126 || status=127
    tell program "$status" 1
    exit "$status"
}

program() {
    tell program 0 1
    rm -rf "$work"
    [ -n "$ATTESTOR_WATCH" ] || become "$@"
    call_inject exec --force --watch "$ATTESTOR_WATCH" "$ATTESTOR_MANIFEST" -- "$0" --become "$@"
}

# In place of this shell, as a user without privileges and with no credentials in its environment.
become() {
    unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_SECURITY_TOKEN AWS_CREDENTIAL_EXPIRATION \
        AWS_CONTAINER_CREDENTIALS_RELATIVE_URI AWS_CONTAINER_CREDENTIALS_FULL_URI AWS_CONTAINER_AUTHORIZATION_TOKEN \
        AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE AWS_WEB_IDENTITY_TOKEN_FILE AWS_EC2_METADATA_TOKEN
    for name in $(env | sed -n 's/^\(AWS_BEARER_TOKEN_[A-Za-z0-9_]*\)=.*/\1/p'); do
        unset "$name"
    done
    setpriv=$(which setpriv) # by its path: a shell of busybox may prefer an applet of that name, which knows less
    [ "$(id -u)" = 0 ] || exec "$setpriv" --no-new-privs -- "$@"
    HOME=$(sed -n "s/^$ATTESTOR_USER:.*:\([^:]*\):[^:]*$/\1/p" /etc/passwd)
    export HOME
    exec "$setpriv" --reuid "$ATTESTOR_USER" --regid "$(id -g "$ATTESTOR_USER")" --init-groups --no-new-privs \
        --bounding-set=-all --inh-caps=-all --ambient-caps=-all -- "$@"
}

# shellcheck disable=SC3045 # both shells that this runs under know -c
ulimit -c 0 # no core dump of what holds a secret; exec keeps it
if [ "${1:-}" = --become ]; then
    shift
    become "$@"
fi
export AWS_EC2_METADATA_V1_DISABLED=true # the SDK then tells a silent metadata service from one without credentials
configuration
[ $# -gt 0 ] || [ -z "$ATTESTOR_WATCH" ] || wrong 'ATTESTOR_WATCH is beside a program, and none is named'
deadline=$(($(uptime_seconds) + ATTESTOR_DEADLINE))
# shellcheck disable=SC2174 # only the last folder is meant: owners open their secrets in it, and nobody lists it
[ -d "$ATTESTOR_SECRETS" ] || mkdir -p -m 0711 "$ATTESTOR_SECRETS"
work=$ATTESTOR_SECRETS/.entrypoint
trap 'rm -rf "$work"' EXIT
rm -rf "$work"
mkdir -m 0700 "$work"

[ $# -eq 0 ] || find_program "$1"
step network
step module
step region
step node
step inject
[ $# -eq 0 ] || program "$@"
