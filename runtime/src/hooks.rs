//! The hooks that run on the host (runtime-spec, config.md, "POSIX-platform Hooks"): prestart, createRuntime,
//! createContainer, poststart and poststop. startContainer hooks run in the guest.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::Hook;
use serde::Serialize;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use crate::host_cgroup;
use crate::oom;
use crate::sandbox::Status;

/// Most bytes of a hook's standard error that are shown.
const MAX_SAID: u64 = 512;

/// What was wrong with a hook.
#[derive(Debug, Error)]
#[error("hooks.{kind}[{n}] ({}): {problem}", path.display())]
pub struct HookError {
    kind: &'static str,
    n: usize,
    path: PathBuf,
    problem: String,
}

impl HookError {
    fn new(occasion: &Occasion<'_>, n: usize, hook: &Hook, problem: String) -> Self {
        Self {
            kind: occasion.kind,
            n,
            path: hook.path().clone(),
            problem,
        }
    }
}

/// What of the container's state (runtime-spec, runtime.md, "State") does not change in its life.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HookState {
    /// The spec's version.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The spec's annotations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<std::collections::HashMap<String, String>>,
}

/// What of the host the server leaves for what is its sandbox's: namespaces and a cgroup. All hooks but createContainer's run there
/// (runtime-spec, config.md, "Summary": "runtime namespace"): what makes a network must find the host's, and what stays behind is
/// none of the container's processes.
#[derive(Debug)]
pub struct RuntimePlace {
    mount: File,
    network: File,
    /// Where to enter a cgroup: that of the caller or, should that be no more, the root. None where there is no cgroup v2.
    cgroups: Arc<[File]>,
}

impl RuntimePlace {
    /// That in which this thread is now.
    pub fn current() -> io::Result<Self> {
        Ok(Self {
            mount: File::open("/proc/thread-self/ns/mnt")?,
            network: File::open("/proc/thread-self/ns/net")?,
            cgroups: host_cgroup::ways_back().into(),
        })
    }

    /// Lets the child enter it. The mount namespace brings its own root, so the directory is looked up anew.
    fn enter(&self, command: &mut Command, directory: &Path) -> io::Result<()> {
        let mount = self.mount.try_clone()?;
        let network = self.network.try_clone()?;
        let cgroups = self.cgroups.clone();
        let directory = CString::new(directory.as_os_str().as_encoded_bytes())?;
        // SAFETY: between fork and exec, a few system calls on what was made before.
        unsafe {
            command.pre_exec(move || {
                setns(network.as_fd(), CloneFlags::CLONE_NEWNET)?;
                setns(mount.as_fd(), CloneFlags::CLONE_NEWNS)?;
                nix::unistd::chdir(directory.as_c_str())?;
                // 0 is whoever writes it. A hook that can go to neither runs all the same.
                let enter = |file: &File| nix::unistd::write(file, b"0").is_ok();
                cgroups.iter().any(enter);
                Ok(())
            });
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct State<'a> {
    #[serde(flatten)]
    state: &'a HookState,
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
}

/// The hooks of a sandbox that run. Its end waits for theirs: what undoes a hook's work must not run beside it.
#[derive(Debug)]
pub struct Runs {
    /// How many hooks have begun.
    begun: AtomicU64,
    /// How many lists of hooks are under way.
    under_way: watch::Sender<usize>,
    /// How many of those that have begun are not waited for any more.
    given_up: watch::Sender<u64>,
    /// Set when nothing is made any more that hooks would be for.
    over: OnceLock<()>,
}

impl Default for Runs {
    fn default() -> Self {
        Self {
            begun: AtomicU64::new(0),
            under_way: watch::Sender::new(0),
            given_up: watch::Sender::new(0),
            over: OnceLock::new(),
        }
    }
}

/// What the hooks of one list have in common.
#[derive(Debug, Clone, Copy)]
pub struct Occasion<'a> {
    /// The list's name in the spec.
    pub kind: &'static str,
    /// What they are told of the container, beside the next two.
    pub state: &'a HookState,
    /// The container's status.
    pub status: Status,
    /// The pid that is told of it, if it has one.
    pub pid: Option<u32>,
    /// Where they run, if not where this thread is.
    pub place: Option<&'a RuntimePlace>,
}

impl Runs {
    /// Runs hooks one after the other; the first that fails is the end.
    pub async fn run(
        &self,
        hooks: Option<&Vec<Hook>>,
        occasion: &Occasion<'_>,
    ) -> Result<(), HookError> {
        let _under_way = UnderWay::new(&self.under_way);
        for (n, hook) in hooks.into_iter().flatten().enumerate() {
            if self.over.get().is_some() {
                let problem = "is not run: the sandbox is being shut down".to_owned();
                return Err(HookError::new(occasion, n, hook, problem));
            }
            self.run_one(n, hook, occasion).await?;
        }
        Ok(())
    }

    /// Runs hooks one after the other; what fails is logged, and the rest goes on, but for what is of no use any more.
    pub async fn run_all(&self, hooks: Option<&Vec<Hook>>, occasion: &Occasion<'_>) {
        let _under_way = UnderWay::new(&self.under_way);
        for (n, hook) in hooks.into_iter().flatten().enumerate() {
            // Those of a stopped container undo something.
            if self.over.get().is_some() && occasion.status != Status::Stopped {
                return;
            }
            if let Err(error) = self.run_one(n, hook, occasion).await {
                tracing::warn!("{error}");
            }
        }
    }

    /// Lets no further hook begin of those that a failure ends.
    pub fn close(&self) {
        let _ = self.over.set(());
    }

    /// Waits until none is under way.
    pub async fn ended(&self) {
        let mut under_way = self.under_way.subscribe();
        // Fails only without a sender, and `self` is one.
        let _ = under_way.wait_for(|&count| count == 0).await;
    }

    /// Kills the hooks that run now if that takes them longer than `patience`. Those that come after them have all the time that they need.
    pub async fn hurry(&self, patience: Duration) {
        let begun = self.begun.load(Ordering::Relaxed);
        if tokio::time::timeout(patience, self.ended()).await.is_err() {
            self.given_up
                .send_modify(|given_up| *given_up = begun.max(*given_up));
        }
    }

    async fn run_one(
        &self,
        n: usize,
        hook: &Hook,
        occasion: &Occasion<'_>,
    ) -> Result<(), HookError> {
        let failed = |problem| HookError::new(occasion, n, hook, problem);
        let number = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        let mut given_up = self.given_up.subscribe();
        let given_up = async {
            let _ = given_up.wait_for(|&given_up| given_up >= number).await;
        };
        let state_json = serde_json::to_vec(&State {
            state: occasion.state,
            status: occasion.status.to_string(),
            pid: occasion.pid,
        })
        .map_err(|error| failed(error.to_string()))?;
        let bundle = &occasion.state.bundle;
        let output = output(hook, bundle, &state_json, given_up, occasion.place).await;
        let (status, said) = output.map_err(|error| failed(error.to_string()))?;
        if status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&said);
        let said = said.trim().replace('\n', " | ");
        Err(failed(format!("{status}: {said}")))
    }
}

/// Counts a list of hooks as long as it is under way.
struct UnderWay<'a>(&'a watch::Sender<usize>);

impl<'a> UnderWay<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Runs the program to its end, or until its time is up or it is given up, and returns its status and the beginning of what it said on standard
/// error.
async fn output(
    hook: &Hook,
    bundle: &Path,
    state: &[u8],
    given_up: impl Future<Output = ()>,
    place: Option<&RuntimePlace>,
) -> io::Result<(ExitStatus, Vec<u8>)> {
    let mut command = Command::new(hook.path());
    let args = hook.args().as_deref().unwrap_or_default();
    if let Some((name, args)) = args.split_first() {
        std::os::unix::process::CommandExt::arg0(command.as_std_mut(), name);
        command.args(args);
    }
    // Without a list of its own a hook gets the runtime's environment, as runc's do.
    if let Some(env) = hook.env() {
        command.env_clear();
        command.envs(env.iter().filter_map(|entry| entry.split_once('=')));
    }
    // While the server's procfs is there.
    oom::unprotect(command.as_std_mut())?;
    command
        .current_dir(bundle)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = match place {
        Some(place) => {
            place.enter(&mut command, bundle)?;
            // It is waited for until it executes its program, and a move to another cgroup takes a grace period of the kernel.
            spawn_blocking(move || command.spawn()).await??
        }
        // As this thread's child, whose namespaces it is to be in.
        None => command.spawn()?,
    };
    let stdin = child.stdin.take();
    let stderr = child.stderr.take();
    let run = async {
        if let Some(mut stdin) = stdin {
            // A hook need not read its input.
            let _ = stdin.write_all(state).await;
        }
        let mut said = Vec::new();
        if let Some(mut stderr) = stderr {
            // The rest has to be read too, or the hook waits.
            (&mut stderr).take(MAX_SAID).read_to_end(&mut said).await?;
            tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await?;
        }
        io::Result::Ok((child.wait().await?, said))
    };
    let timeout = hook.timeout();
    let timeout = timeout.and_then(|seconds| u64::try_from(seconds).ok());
    let time_is_up = async {
        match timeout {
            Some(seconds) => {
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                format!("did not end within {seconds} s and was killed")
            }
            None => std::future::pending().await,
        }
    };
    let problem = tokio::select! {
        ended = run => return ended,
        problem = time_is_up => problem,
        () = given_up => "did not end when its sandbox was ended by force, and was killed".to_owned(),
    };
    child.kill().await?;
    Err(io::Error::new(io::ErrorKind::TimedOut, problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_cgroup::tests::with_cgroups;
    use serde_json::{Value, json};

    fn state(bundle: &Path) -> HookState {
        HookState {
            oci_version: "1.0.2".into(),
            id: "c1".into(),
            bundle: bundle.to_path_buf(),
            annotations: None,
        }
    }

    fn hooks(hooks: Value) -> Vec<Hook> {
        serde_json::from_value(hooks).unwrap()
    }

    fn prestart(state: &HookState) -> Occasion<'_> {
        Occasion {
            kind: "prestart",
            state,
            status: Status::Creating,
            pid: None,
            place: None,
        }
    }

    fn run_them(hooks: &Vec<Hook>, dir: &Path) -> Result<(), HookError> {
        run_in(None, hooks, dir)
    }

    fn run_in(
        place: Option<&RuntimePlace>,
        hooks: &Vec<Hook>,
        dir: &Path,
    ) -> Result<(), HookError> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(Runs::default().run(
                Some(hooks),
                &Occasion {
                    pid: Some(7),
                    place,
                    ..prestart(&state(dir))
                },
            ))
    }

    #[test]
    fn a_hook_of_the_runtime_sees_the_hosts_namespaces_and_no_other_does() {
        assert!(nix::unistd::geteuid().is_root(), "the test needs root");
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(json!([{
            "path": "/bin/sh",
            "args": ["sh", "-c", "readlink /proc/self/ns/net /proc/self/ns/mnt > seen; pwd >> seen"]
        }]));
        let of_this_thread = || {
            ["net", "mnt"].map(|name| {
                let link = std::fs::read_link(format!("/proc/thread-self/ns/{name}")).unwrap();
                link.to_str().unwrap().to_owned()
            })
        };
        let seen = || std::fs::read_to_string(dir.path().join("seen")).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let host = RuntimePlace::current().unwrap();
                let hosts = of_this_thread();
                crate::share::private_mount_namespace().unwrap();
                crate::standin::enter_network(None).unwrap();
                let own = of_this_thread();
                assert!(hosts[0] != own[0] && hosts[1] != own[1]);
                let expected = |[network, mount]: &[String; 2]| {
                    format!("{network}\n{mount}\n{}\n", dir.path().display())
                };
                run_in(Some(&host), &hooks, dir.path()).unwrap();
                assert_eq!(seen(), expected(&hosts));
                run_in(None, &hooks, dir.path()).unwrap();
                assert_eq!(seen(), expected(&own));
            });
        });
    }

    #[test]
    fn a_hook_of_the_runtime_is_in_the_cgroup_that_the_server_has_left() {
        with_cgroups(|| {
            let cgroups = Path::new("/sys/fs/cgroup");
            let name = format!("bulkhead-hooks-{}", std::process::id());
            std::fs::create_dir(cgroups.join(&name)).unwrap();
            let open = |cgroup: PathBuf| {
                let procs = cgroup.join("cgroup.procs");
                File::options().write(true).open(procs).unwrap()
            };
            let gone = cgroups.join(format!("{name}-gone"));
            std::fs::create_dir(&gone).unwrap();
            let mut place = RuntimePlace::current().unwrap();
            assert_eq!(place.cgroups.len(), 2);
            place.cgroups = [open(gone.clone()), open(cgroups.join(&name))].into();
            std::fs::remove_dir(&gone).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let hooks = hooks(json!([
                {"path": "/bin/sh", "args": ["sh", "-c", "grep ^0: /proc/self/cgroup > seen"]}
            ]));
            let ran = run_in(Some(&place), &hooks, dir.path());
            std::fs::remove_dir(cgroups.join(&name)).unwrap();
            ran.unwrap();
            let seen = std::fs::read_to_string(dir.path().join("seen")).unwrap();
            assert_eq!(seen, format!("0::/{name}\n"));
            place.cgroups = [].into();
            run_in(Some(&place), &hooks, dir.path()).unwrap();
        });
    }

    #[test]
    fn a_hook_gets_the_state_its_arguments_its_environment_and_the_bundle_as_directory() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(json!([{
            "path": "/bin/sh",
            "args": ["sh", "-c", "cat > state; echo $A $0 $1 ${HOME-none} > seen", "zero", "one"],
            "env": ["A=b"]
        }]));
        run_them(&hooks, dir.path()).unwrap();
        let state = std::fs::read(dir.path().join("state")).unwrap();
        let state: Value = serde_json::from_slice(&state).unwrap();
        assert_eq!(
            state,
            json!({"ociVersion": "1.0.2", "id": "c1", "bundle": dir.path(), "status": "creating", "pid": 7})
        );
        let seen = std::fs::read_to_string(dir.path().join("seen")).unwrap();
        assert_eq!(seen, "b zero one none\n");
    }

    #[test]
    fn the_first_failure_ends_the_list_and_names_the_hook() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(json!([
            {"path": "/bin/sh", "args": ["sh", "-c", "echo no such network >&2; exit 3"]},
            {"path": "/bin/sh", "args": ["sh", "-c", "touch second"]}
        ]));
        let message = run_them(&hooks, dir.path()).unwrap_err().to_string();
        assert!(
            message.starts_with("hooks.prestart[0] (/bin/sh): "),
            "{message}"
        );
        assert!(message.contains("3: no such network"), "{message}");
        assert!(!dir.path().join("second").exists());
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(json!([
            {"path": "/bin/sh", "args": ["sh", "-c", "echo $$ > pid; exec sleep 1000"], "timeout": 1}
        ]));
        let message = run_them(&hooks, dir.path()).unwrap_err().to_string();
        assert!(message.contains("did not end within 1 s"), "{message}");
        let pid = std::fs::read_to_string(dir.path().join("pid")).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        assert!(status.map_or(true, |status| status.contains(") Z ")));
    }

    #[test]
    fn a_sandboxs_end_waits_for_the_hook_under_way_and_no_other_of_a_creation_begins() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let hooks = hooks(json!([
            {"path": "/bin/sh", "args": ["sh", "-c", "read line < fifo; echo $line >> log"]},
            {"path": "/bin/sh", "args": ["sh", "-c", "echo second >> log"]}
        ]));
        let (runs, state) = (Runs::default(), state(dir.path()));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (ran, ()) = runtime.block_on(async {
            let occasion = prestart(&state);
            let ran = runs.run(Some(&hooks), &occasion);
            let end = async {
                runs.close();
                let mut ended = std::pin::pin!(runs.ended());
                assert!(futures::poll!(&mut ended).is_pending());
                std::fs::write(&fifo, "first\n").unwrap();
                ended.await;
            };
            tokio::join!(ran, end)
        });
        let message = ran.unwrap_err().to_string();
        assert!(
            message.starts_with("hooks.prestart[1] (/bin/sh): is not run"),
            "{message}"
        );
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(log, "first\n");
    }

    #[test]
    fn an_end_by_force_gives_up_the_hooks_that_run_then_and_no_later_ones() {
        let dir = tempfile::tempdir().unwrap();
        let waits = hooks(json!([{"path": "/bin/sleep", "args": ["sleep", "1000"]}]));
        let later = hooks(json!([
            {"path": "/bin/sh", "args": ["sh", "-c", "sleep 0.2; echo later >> log"]}
        ]));
        let (runs, state) = (Runs::default(), state(dir.path()));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let occasion = prestart(&state);
            let waits = runs.run(Some(&waits), &occasion);
            let (ran, ()) = tokio::join!(waits, runs.hurry(Duration::from_millis(50)));
            let message = ran.unwrap_err().to_string();
            assert!(message.contains("by force, and was killed"), "{message}");
            let stopped = Occasion {
                kind: "poststop",
                status: Status::Stopped,
                ..prestart(&state)
            };
            runs.run_all(Some(&later), &stopped).await;
        });
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(log, "later\n");
    }
}
