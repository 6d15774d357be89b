//go:build tools

// Package tools pins the API server, and the kubectl, of cargo xtask test --api-server
package tools

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kubectl"
)
