//go:build v2

package main

import (
	"context"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

const version = aws.SDKVersion

func newCaller(address, region string) (caller, error) {
	loaded, err := config.LoadDefaultConfig(context.Background(), config.WithRegion(region))
	if err != nil {
		return nil, err
	}
	client := sts.NewFromConfig(loaded, func(options *sts.Options) {
		options.BaseEndpoint = aws.String("http://" + address)
	})
	return func() (string, error) {
		answer, err := client.GetCallerIdentity(context.Background(), &sts.GetCallerIdentityInput{})
		if err != nil {
			return "", err
		}
		return aws.ToString(answer.Arn), nil
	}, nil
}

func findRegion() (string, error) {
	loaded, err := config.LoadDefaultConfig(context.Background(), config.WithEC2IMDSRegion())
	return loaded.Region, err
}
