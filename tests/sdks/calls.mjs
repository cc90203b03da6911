// AWS's SDK for JavaScript as any service uses it: nothing here knows of attestor.
import { readFileSync } from "node:fs";
import * as sdk from "@aws-sdk/client-kms";

const kms = new sdk.KMSClient({});
const [key, denied] = process.argv.slice(2);
const EncryptionContext = { node: "3" };
const text = (bytes) => Buffer.from(bytes).toString("hex");

const opened = await kms.send(
  new sdk.DecryptCommand({ CiphertextBlob: readFileSync("blob"), EncryptionContext }),
);
const made = await kms.send(
  new sdk.GenerateDataKeyCommand({ KeyId: key, KeySpec: "AES_256", EncryptionContext }),
);
const again = await kms.send(
  new sdk.DecryptCommand({ CiphertextBlob: made.CiphertextBlob, EncryptionContext }),
);
let refused;
try {
  await kms.send(new sdk.GenerateDataKeyCommand({ KeyId: denied, KeySpec: "AES_256", EncryptionContext }));
} catch (error) {
  refused = { code: error.name, status: error.$metadata.httpStatusCode, id: error.$metadata.requestId };
}
console.log(
  JSON.stringify({
    plaintext: text(opened.Plaintext),
    key: text(made.Plaintext),
    again: text(again.Plaintext),
    ...refused,
  }),
);
