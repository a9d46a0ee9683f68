//! Hooks: their order, what they are told, and what their failures do.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::process::Stdio;

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{assert_same_as_runc, bulkhead, run_with_input};
use bulkhead_e2e::container::{Container, reap_all};
use bulkhead_e2e::leaks::Host;
use serde_json::{Value, json};

#[test]
fn hooks_run_in_the_order_of_the_spec_with_the_state_on_standard_input() {
    let _unchanged = Host::unchanged();
    // A poststart hook runs beside the container, which therefore waits for it here.
    let mut bundle =
        Bundle::shell("while [ ! -e /order.poststart.ran ]; do :; done; echo container >> /order");
    let order = bundle.in_root("order");
    let log = order.to_str().unwrap().to_owned();
    let hook = |name: &str| {
        let script = format!("cat > {log}.{name}; echo {name} >> {log}; echo > {log}.{name}.ran");
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    bundle.config["hooks"] = json!({
        "prestart": hook("prestart"), "createRuntime": hook("createRuntime"), "createContainer": hook("createContainer"),
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo startContainer >> /order"]}],
        "poststart": hook("poststart"), "poststop": hook("poststop"),
    });
    let container = Container::running(bulkhead(), &bundle);
    assert_eq!(container.wait(), 0);
    container.command(&["delete"]).expect_code(0);
    assert_eq!(
        fs::read_to_string(&order).unwrap(),
        "prestart\ncreateRuntime\ncreateContainer\nstartContainer\npoststart\ncontainer\npoststop\n"
    );
    let state = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(format!("{log}.{name}")).unwrap()).unwrap()
    };
    for (name, status) in [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("createContainer", "creating"),
        ("poststart", "running"),
    ] {
        let state = state(name);
        assert_eq!(state["id"], container.id.as_str(), "{name}");
        assert_eq!(state["pid"], container.pid.as_raw(), "{name}");
        assert_eq!(state["status"], status, "{name}");
    }
    assert_eq!(state("poststop")["status"], "stopped");
}

#[test]
fn a_hook_that_fails_before_the_start_undoes_the_container() {
    let unchanged = Host::unchanged();
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let mut bundle = Bundle::idle();
        bundle.config["hooks"] =
            json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", "echo no luck >&2; exit 3"]}]});
        let Err(ended) = Container::try_create(bulkhead(), &bundle, &[]) else {
            panic!("{kind}: created all the same");
        };
        assert_eq!(ended.code, 1);
        assert!(
            ended.stderr.contains(kind) && ended.stderr.contains("no luck"),
            "{}",
            ended.stderr
        );
        reap_all();
        unchanged.at_once(kind);
    }
}

#[test]
fn a_hook_that_fails_after_the_start_is_logged_and_changes_nothing() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("read line; exit 6");
    let seen = bundle.in_root("seen").to_str().unwrap().to_owned();
    // Those behind it run all the same.
    let hooks = |kind: &str| {
        let scripts = [
            format!("echo no luck {kind} >&2; exit 3"),
            format!("echo {kind} >> {seen}"),
        ];
        let hooks = scripts.map(|script| json!({"path": "/bin/sh", "args": ["sh", "-c", script]}));
        json!(hooks)
    };
    bundle.config["hooks"] =
        json!({"poststart": hooks("poststart"), "poststop": hooks("poststop")});
    let told = |log: &str, kind: &str| {
        let told =
            log.contains(&format!("hooks.{kind}[0]")) && log.contains(&format!("no luck {kind}"));
        assert!(told, "{kind}: {log}");
    };

    let (input, mut line) = std::io::pipe().unwrap();
    let null = || Stdio::from(fs::File::options().write(true).open("/dev/null").unwrap());
    let container = Container::create_on(bulkhead(), &bundle, [input.into(), null(), null()]);
    container.command(&["start"]).expect_code(0);
    assert_eq!(container.status(), "running");
    let log = format!("/run/bulkhead/{}/server.log", container.id);
    told(&fs::read_to_string(log).unwrap(), "poststart");
    line.write_all(b"go on\n").unwrap();
    assert_eq!(container.wait(), 6);
    container.command(&["delete"]).expect_code(0);
    assert_eq!(fs::read_to_string(&seen).unwrap(), "poststart\npoststop\n");
    drop(container);

    let ended = run_with_input(&bundle, b"go on\n").expect_code(6);
    told(&ended.stderr, "poststart");
    told(&ended.stderr, "poststop");
}

#[test]
fn start_hooks_run_in_the_container() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("cat /tmp/hooked; grep -o '\"status\":\"[a-z]*\"' /tmp/state");
    bundle.config["hooks"] = json!({"startContainer": [
        {"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/state; echo $A > /tmp/hooked; uname -s >> /tmp/hooked"],
         "env": ["A=1", "PATH=/bin"], "timeout": 100},
        {"path": "/bin/sh", "args": ["sh", "-c", "echo $TERM >> /tmp/hooked"]}
    ]});
    assert_same_as_runc(&bundle);
}
