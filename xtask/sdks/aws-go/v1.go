//go:build v1

package main

import (
	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/ec2metadata"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/sts"
)

const version = aws.SDKVersion

func newCaller(address, region string) (caller, error) {
	made, err := session.NewSession(aws.NewConfig().WithRegion(region))
	if err != nil {
		return nil, err
	}
	client := sts.New(made, aws.NewConfig().WithEndpoint("http://"+address))
	return func() (string, error) {
		answer, err := client.GetCallerIdentity(&sts.GetCallerIdentityInput{})
		if err != nil {
			return "", err
		}
		return aws.StringValue(answer.Arn), nil
	}, nil
}

func findRegion() (string, error) {
	made, err := session.NewSession()
	if err != nil {
		return "", err
	}
	return ec2metadata.New(made).Region()
}
