//! The way to the API server: how to log in, a watch that never ends, and what it has said. One of the two
//! homes of kube; the other one is the agent's module of the same name, which knows what is asked.

mod client;
mod store;
mod watch;

pub use self::{
    client::{ClientConfig, ClientError, client_config},
    store::Store,
    watch::follow,
};
