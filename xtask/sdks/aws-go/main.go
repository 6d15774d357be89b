// Makes a signed call as the SDK does by itself (v1 or v2, by the build tag); each line of input asks once more: `new` with a new session,
// `kept` with the one that lives as long as the process, `region` for the region that the SDK finds by itself. Arguments: where STS is
// (host:port), the region. Prints JSON lines.
package main

import (
	"bufio"
	"encoding/json"
	"log"
	"os"
	"time"
)

// Makes a call with one client, and returns the ARN that STS tells.
type caller func() (string, error)

func main() {
	var kept caller
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		answer, err := ask(lines.Text(), &kept)
		if err != nil {
			log.Fatal(err)
		}
		if err := json.NewEncoder(os.Stdout).Encode(answer); err != nil {
			log.Fatal(err)
		}
	}
}

func ask(how string, kept *caller) (map[string]any, error) {
	if how == "region" {
		region, err := findRegion()
		return map[string]any{"Region": region, "Version": version}, err
	}
	begun := time.Now()
	call := *kept
	if how != "kept" || call == nil {
		var err error
		if call, err = newCaller(os.Args[1], os.Args[2]); err != nil {
			return nil, err
		}
	}
	if how == "kept" {
		*kept = call
	}
	arn, err := call()
	return map[string]any{"Arn": arn, "Millis": time.Since(begun).Milliseconds(), "Version": version}, err
}
