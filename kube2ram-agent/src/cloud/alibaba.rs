//! Alibaba Cloud: STS, request signing, the ECS metadata server.
