//! A thread and a runtime for the admin listener alone: it answers while all threads that serve pods are busy
//! or blocked. Depends on the parent; called by `app`.

use std::{
    io,
    net::TcpListener as StdTcpListener,
    os::fd::AsFd as _,
    sync::{Arc, mpsc},
    thread,
};

use tokio::{
    net::TcpListener,
    runtime::{Builder, Handle},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::{AbortOnDropHandle, TaskTracker},
};

use super::Admin;
use crate::drain::Drain;

/// The thread. Dropping this ends it, with all connections that it serves.
#[derive(Debug)]
pub struct AdminThread {
    runtime: Handle,
    _until: DropGuard,
}

impl AdminThread {
    /// Starts the thread, which serves nothing yet.
    ///
    /// # Errors
    /// When the thread or its runtime cannot be created.
    pub fn start() -> io::Result<Self> {
        let (until, (report, built)) = (CancellationToken::new(), mpsc::channel());
        let ended = until.clone();
        // Built and dropped there: a runtime must not be dropped where another one runs.
        thread::Builder::new().name("admin".into()).spawn(move || {
            match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => {
                    drop(report.send(Ok(runtime.handle().clone())));
                    runtime.block_on(ended.cancelled());
                }
                Err(error) => drop(report.send(Err(error))),
            }
        })?;
        let runtime = built.recv().map_err(io::Error::other)??;
        Ok(Self { runtime, _until: until.drop_guard() })
    }

    /// Does what [`Admin::serve`] does, on this thread. Dropping what is returned ends accepting.
    ///
    /// # Errors
    /// When the listener's descriptor cannot be copied, or cannot be watched.
    pub fn serve(
        &self,
        admin: Arc<Admin>,
        listener: &TcpListener,
        tasks: TaskTracker,
        drain: Drain,
    ) -> io::Result<AbortOnDropHandle<()>> {
        let copy = StdTcpListener::from(listener.as_fd().try_clone_to_owned()?);
        // The other runtime's driver watches `listener`, and is blocked when its threads are.
        let listener = {
            let _entered = self.runtime.enter();
            TcpListener::from_std(copy)?
        };
        let serving = admin.serve(Arc::new(listener), tasks, drain);
        Ok(AbortOnDropHandle::new(self.runtime.spawn(serving)))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Ipv4Addr, SocketAddr, TcpStream},
        time::{Duration, Instant},
    };

    use prometheus_client::registry::Registry;
    use tokio::runtime::Runtime;

    use super::*;
    use crate::admin::Readiness;

    /// How long anything may take on a busy machine.
    const DEADLINE: Duration = Duration::from_secs(60);

    /// A runtime whose only thread is blocked until the sender is dropped.
    fn blocked() -> (Runtime, mpsc::Sender<()>) {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let ((release, released), (report, begun)) = (mpsc::channel::<()>(), mpsc::channel());
        drop(runtime.spawn(async move {
            report.send(()).unwrap();
            let _is_released = released.recv();
        }));
        begun.recv().unwrap();
        (runtime, release)
    }

    /// An admin service whose pods are served by `serving`.
    fn serve(thread: &AdminThread, serving: &Runtime) -> (SocketAddr, AbortOnDropHandle<()>) {
        let (readiness, registry) = (Readiness::default(), Registry::default());
        let admin = Arc::new(Admin { readiness, registry, serving: serving.handle().clone() });
        let listener = StdTcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = {
            let _entered = serving.enter();
            TcpListener::from_std(listener).unwrap()
        };
        (address, thread.serve(admin, &listener, TaskTracker::new(), Drain::new()).unwrap())
    }

    fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn metrics_are_answered_while_all_threads_that_serve_pods_are_blocked() {
        let (serving, release) = blocked();
        let thread = AdminThread::start().unwrap();
        let (address, _accepting) = serve(&thread, &serving);

        assert!(ask(address, "/metrics").starts_with("HTTP/1.0 200"));
        let probes = ["/healthz", "/readyz"];
        let answers =
            probes.map(|path| thread::spawn(move || ask(address, path))).map(|asking| asking.join());
        for answer in answers {
            let answer = answer.unwrap();
            assert!(answer.starts_with("HTTP/1.0 503") && answer.ends_with("are blocked\n"), "{answer}");
        }

        drop(release);
        for path in probes {
            let answer = ask(address, path);
            assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
        }
    }

    #[test]
    fn the_listener_is_closed_when_the_thread_ends() {
        let (serving, _release) = blocked();
        let thread = AdminThread::start().unwrap();
        let (address, _accepting) = serve(&thread, &serving);
        assert!(ask(address, "/metrics").starts_with("HTTP/1.0 200"));

        drop(thread);

        let deadline = Instant::now() + DEADLINE;
        while TcpStream::connect(address).is_ok() {
            assert!(Instant::now() < deadline, "it is still open");
            thread::yield_now();
        }
    }
}
