// Obtains credentials as the SDK does by itself; each line of input asks once more: `new` with a new provider, `kept` with the one that
// lives as long as the process. The argument is where STS is (host:port). Prints JSON lines.
package main

import (
	"bufio"
	"encoding/json"
	"log"
	"os"
	"runtime/debug"

	openapi "github.com/alibabacloud-go/darabonba-openapi/v2/client"
	"github.com/alibabacloud-go/darabonba-openapi/v2/utils"
	"github.com/alibabacloud-go/tea/dara"
	"github.com/aliyun/credentials-go/credentials"
)

func main() {
	var kept credentials.Credential
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		provider := kept
		if lines.Text() != "kept" || kept == nil {
			var err error
			if provider, err = credentials.NewCredential(nil); err != nil {
				log.Fatal(err)
			}
		}
		if lines.Text() == "kept" {
			kept = provider
		}
		line, err := ask(os.Args[1], provider)
		if err != nil {
			log.Fatal(err)
		}
		if err := json.NewEncoder(os.Stdout).Encode(line); err != nil {
			log.Fatal(err)
		}
	}
}

func ask(sts string, provider credentials.Credential) (map[string]any, error) {
	given, err := provider.GetCredential()
	if err != nil {
		return nil, err
	}
	config := new(utils.Config).SetCredential(provider).SetEndpoint(sts).SetProtocol("http")
	api, err := openapi.NewClient(config)
	if err != nil {
		return nil, err
	}
	params := new(utils.Params).SetAction("GetCallerIdentity").SetVersion("2015-04-01").SetProtocol("HTTP").
		SetPathname("/").SetMethod("POST").SetAuthType("AK").SetStyle("RPC").SetReqBodyType("formData").SetBodyType("json")
	answer, err := api.CallApi(params, new(utils.OpenApiRequest), new(dara.RuntimeOptions))
	if err != nil {
		return nil, err
	}
	return map[string]any{
		"AccessKeyId":     given.AccessKeyId,
		"AccessKeySecret": given.AccessKeySecret,
		"SecurityToken":   given.SecurityToken,
		"Arn":             answer["body"].(map[string]any)["Arn"],
		"Version":         version("github.com/aliyun/credentials-go"),
	}, nil
}

// The version of a module that this program was built from.
func version(module string) string {
	info, _ := debug.ReadBuildInfo()
	for _, dependency := range info.Deps {
		if dependency.Path == module {
			return dependency.Version
		}
	}
	return ""
}
