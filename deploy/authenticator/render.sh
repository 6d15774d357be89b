#!/bin/sh
# Writes kustomize/authenticator.yaml and kustomize/crd.yaml, which are what the chart renders: sh deploy/authenticator/render.sh [path of helm]
set -eu
cd "$(dirname "$0")"
{
    echo "# Made of deploy/authenticator/helm, whose templates and values tell what each line is for, by render.sh."
    "${1:-helm}" template kube2ram-authenticator --namespace=kube-system --kube-version=1.36 --set clusterId=none helm |
        grep -v -e '^# Source: ' -e '^ *app.kubernetes.io/managed-by: ' -e '^ *helm.sh/chart: ' |
        # The server refuses to start without one.
        sed 's/clusterID: "none"/clusterID: ""/'
} > kustomize/authenticator.yaml
cp helm/crds/ramidentitymappings.yaml kustomize/crd.yaml
