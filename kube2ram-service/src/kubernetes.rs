//! The way to the API server: how to log in, a watch that never ends, what it has said, and Events to it. One
//! of the homes of kube; the agent's module of the same name and the authenticator's `backend` know what is
//! asked.

mod client;
mod events;
mod list;
mod store;
mod watch;

pub use self::{
    client::{ClientConfig, ClientError, client_config},
    events::{Events, Notice, RESULTS as EVENT_RESULTS},
    list::{ListError, Page, list_page},
    store::Store,
    watch::{FirstList, FollowConfig, follow},
};
