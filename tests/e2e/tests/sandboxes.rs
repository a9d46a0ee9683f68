//! Several containers in one sandbox, and several sandboxes on one host.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::net::UnixStream;

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::bulkhead;
use bulkhead_e2e::container::Container;
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::{processes, watch};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, KillRequest, PauseRequest, ResumeRequest, StartRequest,
    StateRequest, StatsRequest, Status, UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

/// The server of a sandbox, as engines call it that put several containers into one.
struct Server {
    runtime: tokio::runtime::Runtime,
    tasks: TaskClient,
}

impl Server {
    fn of(container: &Container) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let socket = format!("/run/bulkhead/{}/task.sock", container.id);
        let stream = UnixStream::connect(socket).unwrap();
        let tasks = runtime
            .block_on(async { TaskClient::new(Client::new(Socket::try_from(stream).unwrap())) });
        Self { runtime, tasks }
    }

    fn call<T>(
        &self,
        call: impl AsyncFnOnce(&TaskClient) -> ttrpc::Result<T>,
    ) -> Result<T, String> {
        let answer = self.runtime.block_on(call(&self.tasks));
        answer.map_err(|error| error.to_string())
    }

    fn create(&self, id: &str, bundle: &Bundle) -> Result<u32, String> {
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.path().to_str().unwrap().to_owned(),
            ..Default::default()
        };
        let answer = self.call(async |tasks| tasks.create(Context::default(), &request).await);
        answer.map(|answer| answer.pid)
    }

    fn start(&self, id: &str) {
        let request = StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.start(Context::default(), &request).await)
            .unwrap();
    }

    fn pause(&self, id: &str) {
        let request = PauseRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.pause(Context::default(), &request).await)
            .unwrap();
    }

    fn resume(&self, id: &str) {
        let request = ResumeRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.resume(Context::default(), &request).await)
            .unwrap();
    }

    fn status(&self, id: &str) -> Status {
        let request = StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.call(async |tasks| tasks.state(Context::default(), &request).await);
        answer.unwrap().status.unwrap()
    }

    fn signal(&self, id: &str, signal: Signal) {
        let request = KillRequest {
            id: id.to_owned(),
            signal: (signal as i32).unsigned_abs(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.kill(Context::default(), &request).await)
            .unwrap();
    }

    fn limit_pids(&self, id: &str, limit: u64) {
        let resources = Any {
            value: json!({"pids": {"limit": limit}}).to_string().into_bytes(),
            ..Default::default()
        };
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        self.call(async |tasks| tasks.update(Context::default(), &request).await)
            .unwrap();
    }

    fn pids_limit(&self, id: &str) -> u64 {
        let request = StatsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.call(async |tasks| tasks.stats(Context::default(), &request).await);
        let metrics = Metrics::parse_from_bytes(&answer.unwrap().stats.value).unwrap();
        metrics.pids.limit
    }

    fn wait(&self, id: &str) -> u32 {
        let request = WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.call(async |tasks| tasks.wait(Context::default(), &request).await);
        answer.unwrap().exit_status
    }

    fn delete(&self, id: &str) {
        let request = DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.delete(Context::default(), &request).await)
            .unwrap();
    }
}

/// How many mounts the server of a container's sandbox has.
fn mounts_of_server(container: &Container) -> usize {
    let pid = fs::read_to_string(format!("/run/bulkhead/{}/server.pid", container.id)).unwrap();
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    mounts.lines().count()
}

/// One that joins namespaces of the container that a process stands for, and tells of signals in a file.
fn beside(pid: Pid) -> Bundle {
    let mut bundle = Bundle::shell(
        "trap 'echo >>/signals' USR1; echo $(readlink /proc/self/ns/ipc) $(hostname) >/joined; echo >/ready; \
         while :; do sleep 1000 & wait $!; done",
    );
    for namespace in bundle.config["linux"]["namespaces"].as_array_mut().unwrap() {
        for kind in ["ipc", "uts"] {
            if namespace["type"] == kind {
                namespace["path"] = json!(format!("/proc/{pid}/ns/{kind}"));
            }
        }
    }
    bundle.config.as_object_mut().unwrap().remove("hostname");
    bundle.write();
    bundle
}

#[test]
fn containers_of_one_sandbox_join_namespaces_and_are_paused_each_by_itself() {
    let _unchanged = Host::unchanged();
    let first = Container::running(bulkhead(), Bundle::idle());
    first.await_output("ready\n");
    let server = Server::of(&first);
    let bundle = beside(first.pid);
    let signals = bundle.in_root("signals");
    let signalled = |times: usize| {
        watch::until(&bundle.in_root(""), &[], || {
            fs::read(&signals).is_ok_and(|bytes| bytes.len() == times)
        });
    };

    // Of one that fails nothing is left.
    let mounts = mounts_of_server(&first);
    let mut missing = beside(first.pid);
    missing.config["process"]["args"] = json!(["/nonesuch"]);
    let refused = server.create("second", missing.write()).unwrap_err();
    assert!(refused.contains("/nonesuch"), "{refused}");
    let foreign = beside(Pid::this());
    let refused = server.create("second", &foreign).unwrap_err();
    assert!(refused.contains("namespace of the host"), "{refused}");
    let mut large = beside(first.pid);
    large.config["linux"]["resources"] = json!({"memory": {"limit": 1_u64 << 40}});
    let refused = server.create("second", large.write()).unwrap_err();
    assert!(refused.contains("do not fit"), "{refused}");
    let mut other = beside(first.pid);
    other.config["annotations"] = json!({"io.bulkhead.vcpus": "1"});
    let refused = server.create("second", other.write()).unwrap_err();
    assert!(refused.contains("first container"), "{refused}");
    assert_eq!(mounts_of_server(&first), mounts);

    server.create("second", &bundle).unwrap();
    assert!(mounts_of_server(&first) > mounts);
    server.start("second");
    watch::until(&bundle.in_root(""), &[], || {
        bundle.in_root("ready").exists()
    });
    let joined = fs::read_to_string(bundle.in_root("joined")).unwrap();
    let own = first.shell("echo $(readlink /proc/self/ns/ipc) $(hostname)");
    assert_eq!(joined, own.expect_code(0).stdout);

    server.pause("second");
    assert_eq!(server.status("second"), Status::PAUSED);
    assert_eq!(first.status(), "running");
    server.signal("second", Signal::SIGUSR1);
    server.limit_pids("second", 100);
    assert_eq!(server.pids_limit("second"), 100);
    assert_eq!(first.shell("echo alive").stdout, "alive\n");
    assert!(!signals.exists(), "it runs");
    server.resume("second");
    signalled(1);

    first.command(&["pause"]).expect_code(0);
    assert_eq!(first.status(), "paused");
    server.signal("second", Signal::SIGUSR1);
    signalled(2);
    server.pause("second");
    server.signal("second", Signal::SIGKILL);
    assert_eq!(server.wait("second"), 137);
    server.delete("second");
    assert_eq!(mounts_of_server(&first), mounts);
    first.command(&["resume"]).expect_code(0);
    assert_eq!(first.shell("echo alive").stdout, "alive\n");

    first.command(&["pause"]).expect_code(0);
    let third = beside(first.pid);
    let refused = server.create("third", &third).unwrap_err();
    assert!(refused.contains("resume it first"), "{refused}");
    first.command(&["resume"]).expect_code(0);

    // One that has stopped is asked about no less than one that runs.
    server.create("third", &third).unwrap();
    server.signal("third", Signal::SIGKILL);
    server.wait("third");
    first.command(&["pause"]).expect_code(0);
    server.delete("third");
    first.command(&["resume"]).expect_code(0);

    // The first is the sandbox's, and goes last.
    server.create("fourth", &third).unwrap();
    first.command_with(&["kill"], &["KILL"]).expect_code(0);
    assert_eq!(first.wait(), 137);
    let refused = first.command(&["delete"]).expect_code(1);
    assert!(
        refused.stderr.contains("before the others"),
        "{}",
        refused.stderr
    );
    server.delete("fourth");
    first.command(&["delete"]).expect_code(0);
}

#[test]
fn files_of_a_container_that_is_deleted_from_a_sandbox_are_held_no_longer() {
    let _unchanged = Host::unchanged();
    const FILES: usize = 500;
    let first = Container::running(bulkhead(), Bundle::idle());
    first.await_output("ready\n");
    let server = Server::of(&first);
    let vmm = processes::named("bulkhead-vmm");
    let descriptors = || processes::descriptors(vmm[0]);
    let volume = tempfile::tempdir().unwrap();
    for file in 0..FILES {
        fs::write(volume.path().join(file.to_string()), "").unwrap();
    }
    let mut bundle = Bundle::shell("ls -l /volume >/seen; mv /seen /ready; exec sleep 100000");
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/volume", "source": volume.path(), "options": ["bind"]}));
    let before = descriptors();
    server.create("second", bundle.write()).unwrap();
    server.start("second");
    watch::until(&bundle.in_root(""), &[], || {
        bundle.in_root("ready").exists()
    });
    assert!(descriptors() >= before + FILES);
    server.signal("second", Signal::SIGKILL);
    server.wait("second");
    server.delete("second");
    // The guest has said that it has forgotten them, and its requests are on their way.
    let start = std::time::Instant::now();
    while descriptors() > before + FILES / 10 {
        assert!(
            start.elapsed().as_secs() < 60,
            "{} of {before}",
            descriptors()
        );
        first.shell("true").expect_code(0);
    }
}

#[test]
fn two_containers_do_not_touch_each_other() {
    let _unchanged = Host::unchanged();
    let one = Container::running(bulkhead(), Bundle::idle());
    let other = Container::running(bulkhead(), Bundle::idle());
    let vmms = processes::named("bulkhead-vmm");
    assert_eq!(vmms.len(), 2);
    one.command(&["delete", "--force"]).expect_code(0);
    assert!(processes::exists(other.pid));
    assert_eq!(other.shell("echo alive").stdout, "alive\n");
}

#[test]
fn a_guest_that_panics_stops_its_container_and_touches_no_other() {
    let _unchanged = Host::unchanged();
    let other = Container::running(bulkhead(), Bundle::idle());
    let mut bundle = Bundle::idle();
    bundle.config["linux"]["resources"] = json!({"memory": {"limit": 33_554_432}});
    bundle.config["annotations"] = json!({
        "io.bulkhead.kernel_arguments": "sysctl.vm.panic_on_oom=2", "io.bulkhead.memory_mib": "128",
    });
    let container = Container::running(bulkhead(), &bundle);
    container.await_output("ready\n");
    let ended = container.shell("head -c 50m /dev/zero | tail -c 45m > /dev/null");
    assert_ne!(ended.code, 0);
    assert_eq!(container.wait(), 255);
    assert_eq!(container.status(), "stopped");
    container.command(&["delete"]).expect_code(0);
    assert_eq!(other.shell("echo alive").stdout, "alive\n");
}
