//go:build tools

// Package tools pins the API server that manifests are applied to in tests: cargo xtask test --api-server
package tools

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
)
