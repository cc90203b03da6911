// AWS's SDK for Go as any service uses it: nothing here knows of attestor.
package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"
)

func main() {
	ctx := context.Background()
	settings, err := config.LoadDefaultConfig(ctx)
	check(err)
	client := kms.NewFromConfig(settings)
	key, denied := os.Args[1], os.Args[2]
	node := map[string]string{"node": "3"}

	blob, err := os.ReadFile("blob")
	check(err)
	opened, err := client.Decrypt(ctx, &kms.DecryptInput{CiphertextBlob: blob, EncryptionContext: node})
	check(err)
	made, err := client.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{
		KeyId: aws.String(key), KeySpec: "AES_256", EncryptionContext: node,
	})
	check(err)
	again, err := client.Decrypt(ctx, &kms.DecryptInput{CiphertextBlob: made.CiphertextBlob, EncryptionContext: node})
	check(err)

	_, err = client.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{
		KeyId: aws.String(denied), KeySpec: "AES_256", EncryptionContext: node,
	})
	var refused smithy.APIError
	var response *awshttp.ResponseError
	if !errors.As(err, &refused) || !errors.As(err, &response) {
		log.Fatalf("not refused: %v", err)
	}
	out, err := json.Marshal(map[string]any{
		"plaintext": hex.EncodeToString(opened.Plaintext),
		"key":       hex.EncodeToString(made.Plaintext),
		"again":     hex.EncodeToString(again.Plaintext),
		"code":      refused.ErrorCode(),
		"status":    response.HTTPStatusCode(),
		"id":        response.ServiceRequestID(),
	})
	check(err)
	fmt.Println(string(out))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
