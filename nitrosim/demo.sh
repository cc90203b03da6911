#!/bin/sh
# The main job against the simulators: a secret is encrypted, decrypted in an enclave that the key policy allows,
# and refused to one that it does not. Run by `make demo`; needs attestor and nitrosim on the PATH.
set -eu
umask 022

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > encrypt.py <<'PYTHON'
import boto3

answer = boto3.client("kms").encrypt(KeyId="alias/nitrosim", Plaintext=b"the secret of node 3",
                                     EncryptionContext={"node": "3"})
open("secret.enc", "wb").write(answer["CiphertextBlob"])
open("key-id", "w").write(answer["KeyId"])
PYTHON

# shellcheck disable=SC2016 # the inner shell expands them
scene='
    python3 encrypt.py
    set -- attestor decrypt --key-id "$(cat key-id)" --context node=3 secret.enc secret
    echo "\$ attestor decrypt --key-id $(cat key-id) --context node=3 secret.enc secret"
    status=0
    "$@" 2>&1 || status=$?
    echo "exit status $status"
'

echo '--- an enclave whose PCR0 the key policy asks for'
nitrosim run -- sh -eu -c "$scene"
echo "\$ stat -c '%a %s bytes %n' secret; cat secret"
stat -c '%a %s bytes %n' secret
cat secret && echo
test "$(cat secret)" = 'the secret of node 3'
test "$(stat -c %a secret)" = 600
rm secret

echo
echo '--- the same, in an enclave with another PCR0'
nitrosim run --pcr "0=$(printf '%096d' 1)" -- sh -eu -c "$scene"
test ! -e secret
echo 'no file was written'
