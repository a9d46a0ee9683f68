//! A container that exists: its state directory, and its server if that still lives.
//!
//! A server can be alive and answer nothing: stopped, or waiting for a device that hangs. What must work all the same, a look at the
//! container and its deletion by force, does without it then; everything else fails.

use std::future::Future;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bulkhead_runtime::hooks::{HookState, Occasion, Runs};
use bulkhead_runtime::id::ContainerId;
use bulkhead_runtime::sandbox::Status;
use bulkhead_runtime::sock;
use bulkhead_runtime::standin;
use bulkhead_runtime::state::{Record, StateDir};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use tokio::time::{sleep, timeout};

use super::Invocation;
use super::client::{ProcessState, Server, ServerError};

/// No such container; in the words that clients look for.
#[derive(Debug, Error)]
#[error("container {0:?} does not exist")]
pub struct Unknown(pub String);

/// How long a server may take to say where a container is in its life, for which it has nothing to wait for.
const STATE_TIMEOUT: Duration = Duration::from_secs(3);

/// After how long without an answer a server is asked whether it answers at all.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a killed server may take to be gone.
const KILL_TIMEOUT_MS: u16 = 10_000;

/// A server lives, and says nothing.
#[derive(Debug, Error)]
#[error("the sandbox server does not answer: `bulkhead delete --force {0}` ends it")]
pub struct Silent(String);

/// A container of this host.
#[derive(Debug, Clone)]
pub struct Known {
    /// Its id.
    pub id: ContainerId,
    /// Its state directory.
    pub state: StateDir,
}

impl Known {
    /// Finds the container `id`.
    pub fn find(invocation: &Invocation, id: &str) -> anyhow::Result<Self> {
        let id = ContainerId::new(id)?;
        let state = StateDir::of(&invocation.root, &id);
        if state.path().symlink_metadata().is_err() {
            return Err(Unknown(id.as_str().to_owned()).into());
        }
        Ok(Self { id, state })
    }

    /// What is on record of it. One that is just being made has no record yet.
    pub fn record(&self) -> anyhow::Result<Record> {
        self.state.load().map_err(|error| {
            if self.state.path().symlink_metadata().is_err() {
                return Unknown(self.id.as_str().to_owned()).into();
            }
            let id = &self.id;
            anyhow::Error::from(error).context(format!(
                "container {id} is being made, or what was on record of it is lost; try again once its `create` has ended, or \
                 remove it with `bulkhead delete --force {id}`"
            ))
        })
    }

    /// A connection to its server; `None` when that has gone.
    pub fn connect(&self) -> anyhow::Result<Option<UnixStream>> {
        match sock::connect(&self.state.task_socket()) {
            Ok(connection) => Ok(Some(connection)),
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Ok(None),
                io::ErrorKind::WouldBlock => Err(self.silent().into()),
                _ => Err(error).context("cannot connect to the sandbox server"),
            },
        }
    }

    fn silent(&self) -> Silent {
        Silent(self.id.as_str().to_owned())
    }

    /// Where in its life it is: as its server says or, if that says nothing, as it was when last put on record.
    pub fn process_state(&self) -> anyhow::Result<ProcessState> {
        block_on(self.ask_state())
    }

    /// [`Known::process_state`], of several containers at once say.
    pub async fn ask_state(&self) -> anyhow::Result<ProcessState> {
        match self.server_state(STATE_TIMEOUT).await {
            Err(error) if error.is::<Silent>() => Ok(recorded_state(&self.record()?)),
            state => state,
        }
    }

    /// Where in its life it is, by its server's word. Without a server nothing of it can run.
    async fn server_state(&self, limit: Duration) -> anyhow::Result<ProcessState> {
        let Some(connection) = self.connect()? else {
            return Ok(STOPPED);
        };
        let server = Server::new(connection, self.id.as_str(), "")?;
        self.state_of(&server, limit).await
    }

    /// The same of a server that is connected.
    async fn state_of(&self, server: &Server<'_>, limit: Duration) -> anyhow::Result<ProcessState> {
        match timeout(limit, server.state()).await {
            Err(_) => Err(self.silent().into()),
            // A server that has not got so far as to know it, or forgets it now, is about to say so otherwise.
            Ok(Err(ServerError::Gone)) => Ok(STOPPED),
            Ok(Err(error)) if error.is_not_found() => Ok(STOPPED),
            Ok(answer) => Ok(answer?),
        }
    }

    /// Awaits an answer of its server as long as that gives others.
    pub async fn patiently<T>(&self, answer: impl Future<Output = T>) -> anyhow::Result<T> {
        tokio::pin!(answer);
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return Ok(answer),
                alive = self.sign_of_life() => alive?,
            }
        }
    }

    /// Gives an answer that is due some time to come, and then asks its server for another, once: an error tells that there was none.
    pub async fn sign_of_life(&self) -> anyhow::Result<()> {
        sleep(PATIENCE).await;
        // What it is busy with may keep it from this for a while.
        self.server_state(PATIENCE).await.map(drop)
    }

    /// Ends its sandbox whatever it is doing, its server too if that does not do it.
    pub fn end(&self) -> anyhow::Result<()> {
        let connection = match self.connect() {
            Ok(Some(connection)) => connection,
            Ok(None) => return Ok(()),
            Err(error) if error.is::<Silent>() => return self.kill_server(),
            Err(error) => return Err(error),
        };
        let end = connection.try_clone()?;
        let told = block_on(async {
            let server = Server::new(connection, self.id.as_str(), "")?;
            Ok(timeout(PATIENCE, server.shutdown(true)).await.is_ok())
        })?;
        if told {
            match self.wait_for_end(&end) {
                Err(error) if error.is::<Silent>() => {}
                ended => return ended,
            }
        }
        self.kill_server()
    }

    /// Waits until its server, which has been told to end, has closed that connection. It may be long about it, waiting for hooks
    /// say, as long as it answers.
    pub fn wait_for_end(&self, mut connection: &UnixStream) -> anyhow::Result<()> {
        let mut bytes = [0; 256];
        // The client that shared this connection has made it non-blocking.
        connection.set_nonblocking(false)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        loop {
            match connection.read(&mut bytes) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    block_on(self.server_state(PATIENCE))?;
                }
                _ => return Ok(()),
            }
        }
    }

    /// Ends its server on the spot, and with that its sandbox.
    pub fn kill_server(&self) -> anyhow::Result<()> {
        let pid = self.state.server_pid()?;
        let server = standin::pidfd(pid).context("cannot find the sandbox server")?;
        // It listens to this moment: until now its pid can't have become another's. Nor has its id.
        if self.connect().is_ok_and(|connection| connection.is_none()) || !self.state.is_there() {
            return Ok(());
        }
        standin::kill(server.as_fd()).context("cannot kill the sandbox server")?;
        let mut ended = [PollFd::new(server.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ended, PollTimeout::from(KILL_TIMEOUT_MS))? == 0 {
            bail!("the sandbox server, process {pid}, does not end though it was killed");
        }
        Ok(())
    }

    /// Forgets it, and ends its sandbox with it. What is on record as stopped needs no server for that.
    pub fn delete(&self) -> anyhow::Result<()> {
        match self.ask_for_deletion() {
            Err(error) if error.is::<Silent>() => {
                if recorded_state(&self.record()?).status == Status::Stopped {
                    return self.kill_server();
                }
                Err(error)
            }
            deleted => deleted,
        }
    }

    fn ask_for_deletion(&self) -> anyhow::Result<()> {
        let Some(connection) = self.connect()? else {
            return Ok(());
        };
        let end = connection.try_clone()?;
        block_on(async {
            let server = Server::new(connection, self.id.as_str(), "")?;
            match self.patiently(server.delete()).await? {
                // One that is just being made is not known yet, nor on record; one that is being deleted still is.
                Err(error) if error.is_not_found() && self.state.load().is_ok() => {}
                Err(error @ ServerError::Refused { .. }) => return Err(error.into()),
                _ => {}
            }
            self.patiently(server.shutdown(false)).await
        })?;
        self.wait_for_end(&end)
    }

    /// Has a session with its server, unless the container has stopped.
    pub fn unless_stopped<T>(
        &self,
        session: impl AsyncFnOnce(&Server<'_>) -> anyhow::Result<T>,
    ) -> anyhow::Result<Option<T>> {
        let Some(connection) = self.connect()? else {
            return Ok(None);
        };
        block_on(async {
            let server = Server::new(connection, self.id.as_str(), "")?;
            if self.state_of(&server, STATE_TIMEOUT).await?.status == Status::Stopped {
                return Ok(None);
            }
            session(&server).await.map(Some)
        })
        .map_err(|error| self.told(error))
    }

    /// Calls its server; that there is none is an error in the words for a stopped container.
    pub fn call<T>(
        &self,
        call: impl AsyncFnOnce(Server<'_>) -> Result<T, ServerError>,
    ) -> anyhow::Result<T> {
        let connection = self
            .connect()?
            .ok_or_else(|| {
                let id = &self.id;
                anyhow!(
                    "container not running: its sandbox has ended; `bulkhead delete {id}` removes what is left of it"
                )
            })?;
        block_on(async {
            let server = Server::new(connection, self.id.as_str(), "")?;
            Ok(self.patiently(call(server)).await??)
        })
        .map_err(|error| self.told(error))
    }

    /// An error with what there is to know of a server that has ended over a call, and what is to be done.
    pub fn told(&self, error: anyhow::Error) -> anyhow::Error {
        if !matches!(error.downcast_ref(), Some(ServerError::Gone)) {
            return error;
        }
        let (id, log) = (&self.id, self.state.server_log());
        let place = if log.exists() {
            format!("in {}", log.display())
        } else {
            "on the standard error of its `bulkhead run`".to_owned()
        };
        anyhow!(
            "{error}: its last words, if any, are {place}; `bulkhead delete --force {id}` removes what is left of the container"
        )
    }
}

/// Removes what a server has left that did not end in order, once the hooks have run that it did not run. The record goes last, so
/// that another try finds it, and until then nobody can make another container of that id.
pub fn clean_up(state: &StateDir) -> anyhow::Result<()> {
    let Some(left) = state.left()? else {
        return Ok(());
    };
    if let Ok(mut record) = state.load() {
        if !record.poststop.is_empty() {
            block_on(run_poststop_hooks(&record))?;
            record.poststop.clear();
            // At worst they run again.
            let _ = state.save(&record);
        }
        if let Some(cgroup) = record.cgroup {
            cgroup.remove()?;
        }
    }
    Ok(left.remove()?)
}

async fn run_poststop_hooks(record: &Record) -> anyhow::Result<()> {
    let annotations = Some(record.annotations.clone()).filter(|all| !all.is_empty());
    let hook_state = HookState {
        oci_version: record.oci_version.clone(),
        id: record.id.clone(),
        bundle: record.bundle.clone(),
        annotations,
    };
    let occasion = Occasion {
        kind: "poststop",
        state: &hook_state,
        status: Status::Stopped,
        pid: None,
        place: None,
    };
    let runs = Runs::default();
    runs.run_all(Some(&record.poststop), &occasion).await;
    Ok(())
}

const STOPPED: ProcessState = ProcessState {
    status: Status::Stopped,
    pid: 0,
};

/// What a record tells: that of a container whose stand-in has ended is out of date.
fn recorded_state(record: &Record) -> ProcessState {
    if record.status == Status::Stopped || !standin::is_alive(record.pid) {
        return STOPPED;
    }
    ProcessState {
        status: record.status,
        pid: record.pid,
    }
}

/// Runs a command's calls.
pub fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::process::Command;
    use std::time::SystemTime;

    use bulkhead_runtime::share::private_mount_namespace;
    use nix::mount::{MsFlags, mount};
    use nix::sys::socket::{Shutdown, shutdown};

    #[test]
    fn who_cleans_up_after_an_ended_server_spares_the_next_one_and_its_cgroup() {
        assert!(nix::unistd::geteuid().is_root(), "the test needs root");
        std::thread::spawn(|| {
            private_mount_namespace().unwrap();
            clean_up_between_two_of_one_id();
        })
        .join()
        .unwrap();
    }

    /// Ends a listener as its process's end does, though another test may be forking.
    fn end(listener: UnixListener) {
        shutdown(listener.as_raw_fd(), Shutdown::Both).unwrap();
    }

    fn clean_up_between_two_of_one_id() {
        let cgroups = Path::new("/sys/fs/cgroup");
        let none = None::<&str>;
        mount(none, cgroups, Some("cgroup2"), MsFlags::empty(), none).unwrap();
        let cgroup = format!("/bulkhead-known-{}", std::process::id());
        let directory = cgroups.join(&cgroup[1..]);
        let record = Record {
            oci_version: "1.0.2".into(),
            id: "c1".into(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: SystemTime::UNIX_EPOCH,
            annotations: HashMap::new(),
            pid: 7,
            status: Status::Running,
            cgroup: serde_json::from_value(
                serde_json::json!({"path": cgroup, "systemd": false, "name": "c1"}),
            )
            .unwrap(),
            poststop: vec![],
            failure: None,
        };
        let root = tempfile::tempdir().unwrap();
        let id = ContainerId::new("c1").unwrap();
        let (ended, listener) = StateDir::claim(root.path(), &id).unwrap();
        ended.save(&record).unwrap();
        end(listener);
        ended.remove().unwrap();

        let (next, listener) = StateDir::claim(root.path(), &id).unwrap();
        next.save(&record).unwrap();
        fs::create_dir(&directory).unwrap();
        let mut process = Command::new("sleep").arg("1000").spawn().unwrap();
        fs::write(directory.join("cgroup.procs"), process.id().to_string()).unwrap();
        clean_up(&ended).unwrap();
        let spared = (process.try_wait().unwrap(), next.load().ok());
        end(listener);
        clean_up(&next).unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(spared, (None, Some(record)));
        assert!(!directory.exists() && !next.path().exists());
    }
}
