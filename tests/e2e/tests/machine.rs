//! The machine itself: boots, ends, pauses, devices; with a probe of the tests' own as PID 1 where no agent is needed.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::machine::{Machine, config};
use bulkhead_protocol::agent::{BindDeviceRequest, HelloRequest};
use bulkhead_protocol::agent_ttrpc::AgentClient;
use bulkhead_protocol::{CONTROL_PORT, PROTOCOL_VERSION};
use bulkhead_vmm::client::ClientError;
use bulkhead_vmm::control::{AttachConfig, BootConfig, VmState, exit_code};

/// Ports of the probe (see `guest-probe`).
const ECHO_PORT: u32 = 7000;
const COMMAND_PORT: u32 = 7001;
const DIAL_PORT: u32 = 7002;

#[test]
fn power_off_reset_and_panic_have_exit_codes_of_their_own() {
    let _unchanged = Host::unchanged();
    for (mode, code) in [
        ("power-off", exit_code::POWER_OFF),
        ("reset", exit_code::RESET),
        ("panic", exit_code::RESET),
    ] {
        let end = Machine::with_probe(mode, config()).wait();
        assert_eq!(end.exit_code, code, "{mode}: {end:#?}");
        assert_eq!(end.reason.lines().count(), 1, "{mode}: {end:#?}");
    }
}

#[test]
fn a_triple_fault_ends_the_vm_with_one_line_and_a_register_dump() {
    let _unchanged = Host::unchanged();
    let config = BootConfig {
        cmdline: "reboot=t".to_owned(),
        ..config()
    };
    let end = Machine::with_probe("reset", config).wait();
    assert_eq!(end.exit_code, exit_code::CRASH, "{end:#?}");
    assert!(
        end.reason.contains("triple fault") && end.reason.contains("vCPU 0"),
        "{end:#?}"
    );
    assert!(
        end.log.contains("rip"),
        "no register dump at debug level: {}",
        end.log
    );
}

#[test]
fn the_guest_sees_the_machine_that_was_asked_for() {
    let _unchanged = Host::unchanged();
    for (vcpus, online) in [(1, "0"), (3, "0-2"), (8, "0-7")] {
        let end = Machine::with_probe("report", BootConfig { vcpus, ..config() }).wait();
        assert_eq!(end.exit_code, exit_code::POWER_OFF, "{end:#?}");
        let value = |key: &str| {
            let prefix = format!("probe: {key}=");
            let line = end
                .serial
                .lines()
                .find_map(|line| line.trim().strip_prefix(&prefix));
            line.unwrap_or_else(|| panic!("no {key} in: {}", end.serial))
                .to_owned()
        };
        assert_eq!(value("cpus"), online);
        assert_eq!(
            (value("cores"), value("siblings")),
            (vcpus.to_string(), vcpus.to_string())
        );
        for flag in ["x2apic", "hypervisor", "tsc_deadline_timer"] {
            assert_eq!(value(flag), "true", "{flag}");
        }
        assert!(
            ["kvm-clock", "tsc"].contains(&value("clocksource").as_str()),
            "{}",
            value("clocksource")
        );
        assert_eq!(value("cpuidle"), "haltpoll");
        assert!(value("rng").starts_with("virtio_rng"), "{}", value("rng"));
        assert_eq!(value("random"), "true");
        let memory: u64 = value("memory_kib").parse().unwrap();
        assert!((90 * 1024..=128 * 1024).contains(&memory), "{memory} KiB");
        assert!(
            end.log.contains("hello from the virtio console"),
            "{}",
            end.log
        );
    }
}

#[test]
fn thirty_two_vcpus_come_up() {
    let _unchanged = Host::unchanged();
    let end = Machine::with_probe(
        "report",
        BootConfig {
            vcpus: 32,
            memory_mib: 256,
            ..config()
        },
    )
    .wait();
    assert_eq!(end.exit_code, exit_code::POWER_OFF, "{end:#?}");
    assert!(end.serial.contains("probe: cpus=0-31"), "{}", end.serial);
}

#[test]
fn memory_above_the_32_bit_gap_is_there() {
    let _unchanged = Host::unchanged();
    let end = Machine::with_probe(
        "report",
        BootConfig {
            memory_mib: 4608,
            ..config()
        },
    )
    .wait();
    assert_eq!(end.exit_code, exit_code::POWER_OFF, "{end:#?}");
    let line = end
        .serial
        .lines()
        .find_map(|line| line.trim().strip_prefix("probe: memory_kib="));
    let memory: u64 = line.unwrap().parse().unwrap();
    assert!(memory > 4300 * 1024, "{memory} KiB");
}

#[test]
fn pause_resume_info_and_shutdown() {
    let _unchanged = Host::unchanged();
    let mut machine = Machine::with_probe("idle", config());
    machine.await_line("probe: idle");
    let info = machine.client.info().unwrap();
    assert_eq!(
        (info.state, info.vcpus, info.memory_mib),
        (VmState::Running, 1, 128)
    );
    assert_eq!(info.pid, machine.process.id());
    assert!(info.timeline.len() >= 5, "{:?}", info.timeline);
    assert!(
        info.timeline.is_sorted_by_key(|entry| entry.at_ns),
        "{:?}",
        info.timeline
    );
    machine.client.pause().unwrap();
    assert_eq!(machine.client.info().unwrap().state, VmState::Paused);
    machine.client.resume().unwrap();
    assert_eq!(machine.client.info().unwrap().state, VmState::Running);
    assert!(
        matches!(
            machine.client.attach(AttachConfig::Rng),
            Err(ClientError::Refused(_))
        ),
        "there is no spare slot"
    );
    machine.client.shutdown().unwrap();
    assert_eq!(machine.wait().exit_code, exit_code::POWER_OFF);
}

#[test]
fn a_vmm_does_not_outlive_its_server() {
    let _unchanged = Host::unchanged();
    let mut machine = Machine::with_probe("idle", config());
    machine.await_line("probe: idle");
    // Closing the control socket is what a server's death looks like.
    let (other, _) = UnixStream::pair().unwrap();
    machine.client = bulkhead_vmm::client::Client::new(other.into());
    assert_eq!(
        machine.process.wait().unwrap().code(),
        Some(exit_code::ORPHANED)
    );
    drop(machine);
}

fn config_with_vsock() -> BootConfig {
    BootConfig {
        memory_mib: 256,
        ..config()
    }
}

/// Boots the probe with its echo service and returns the connection on which it takes commands.
fn boot_vsock_probe() -> (Machine, BufReader<UnixStream>) {
    let mut machine = Machine::spawn();
    let listener = machine.listen(COMMAND_PORT);
    machine.boot_probe("vsock", config_with_vsock());
    let mut commands = BufReader::new(machine.accept(&listener));
    assert_eq!(read_line(&mut commands), "ready");
    (machine, commands)
}

fn read_line(stream: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_when_resumed() {
    let _unchanged = Host::unchanged();
    let (mut machine, commands) = boot_vsock_probe();
    let mut stream = machine.dial(ECHO_PORT).unwrap();
    let mut echoed = [0; 5];
    stream.write_all(b"first").unwrap();
    stream.read_exact(&mut echoed).unwrap();
    machine.client.pause().unwrap();
    stream.write_all(b"later").unwrap();
    stream
        .set_read_timeout(Some(std::time::Duration::from_secs(2)))
        .unwrap();
    let error = stream.read(&mut echoed).unwrap_err();
    assert_eq!(
        error.kind(),
        std::io::ErrorKind::WouldBlock,
        "a paused guest answered"
    );
    machine.client.resume().unwrap();
    stream.set_read_timeout(None).unwrap();
    stream.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"later");
    drop(commands);
    assert_eq!(machine.wait().exit_code, exit_code::POWER_OFF);
}

#[test]
fn hundreds_of_vsock_connections_from_the_host_carry_data_both_ways() {
    let _unchanged = Host::unchanged();
    let (machine, commands) = boot_vsock_probe();
    let mut streams: Vec<_> = (0..200).map(|_| machine.dial(ECHO_PORT).unwrap()).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream
            .write_all(format!("connection {number}").repeat(100).as_bytes())
            .unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut echoed = String::new();
        stream.read_to_string(&mut echoed).unwrap();
        assert_eq!(echoed, format!("connection {number}").repeat(100));
    }
    drop(commands);
    assert_eq!(machine.wait().exit_code, exit_code::POWER_OFF);
}

#[test]
fn vsock_connections_from_the_guest_reach_the_hosts_listeners_or_are_refused() {
    let _unchanged = Host::unchanged();
    let (mut machine, mut commands) = boot_vsock_probe();
    let listener = machine.listen(DIAL_PORT);
    commands.get_mut().write_all(b"d").unwrap();
    let streams: Vec<_> = (0..100).map(|_| machine.accept(&listener)).collect();
    for mut stream in streams {
        let mut number = Vec::new();
        stream.read_to_end(&mut number).unwrap();
        number.reverse();
        stream.write_all(&number).unwrap();
    }
    assert_eq!(read_line(&mut commands), "done");
    commands.get_mut().write_all(b"r").unwrap();
    assert_eq!(read_line(&mut commands), "ConnectionReset");
    drop(commands);
    assert_eq!(machine.wait().exit_code, exit_code::POWER_OFF);
}

#[test]
fn a_vsock_port_where_nobody_listens_in_the_guest_refuses() {
    let _unchanged = Host::unchanged();
    let (machine, commands) = boot_vsock_probe();
    assert!(machine.dial(7999).is_none());
    drop(commands);
    machine.wait();
}

#[test]
fn a_slow_reader_slows_the_vsock_writer_and_nothing_is_lost() {
    let _unchanged = Host::unchanged();
    let (machine, commands) = boot_vsock_probe();
    let mut stream = machine.dial(ECHO_PORT).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let data: Vec<u8> = (0..8 << 20)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    // Nothing is read until no more can be written: every buffer on the way is full.
    writer.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while let Ok(count) = writer.write(&data[sent..]) {
        sent += count;
    }
    assert!(
        sent < data.len(),
        "8 MiB fit in the buffers: no back-pressure"
    );
    writer.set_nonblocking(false).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            writer.write_all(&data[sent..]).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut echoed = Vec::new();
        stream.read_to_end(&mut echoed).unwrap();
        assert!(
            echoed == data,
            "{} bytes came back of {}",
            echoed.len(),
            data.len()
        );
    });
    drop(commands);
    assert_eq!(machine.wait().exit_code, exit_code::POWER_OFF);
}

/// The value of a line `probe: KEY=VALUE` that the probe has written to the virtio console.
fn logged<'a>(log: &'a str, key: &str) -> &'a str {
    let prefix = format!("probe: {key}=");
    log.lines()
        .find_map(|line| line.split_once(&prefix))
        .unwrap_or_else(|| panic!("no {key} in: {log}"))
        .1
}

#[test]
fn guests_made_from_a_template_go_on_where_it_was_saved() {
    let _unchanged = Host::unchanged();
    let config = BootConfig {
        vcpus: 3,
        serial: false,
        ..config()
    };
    let mut first = Machine::spawn();
    let listener = first.listen(DIAL_PORT);
    let template = first.template_of_probe("prepared", config.clone());
    let mut machines = vec![(first, listener)];
    for _ in 0..2 {
        let mut machine = Machine::spawn();
        let listener = machine.listen(DIAL_PORT);
        machine
            .restore_probe("prepared", config.clone(), &template)
            .unwrap();
        machines.push((machine, listener));
    }
    let mut randoms = Vec::new();
    for (number, (mut machine, listener)) in machines.into_iter().enumerate() {
        let mut stream = machine.accept(&listener);
        let mut call = String::new();
        stream.read_to_string(&mut call).unwrap();
        assert_eq!(call, "call");
        write!(stream, "number {number}").unwrap();
        drop(stream);
        let end = machine.wait();
        assert_eq!(end.exit_code, exit_code::POWER_OFF, "{end:#?}");
        assert_eq!(logged(&end.log, "ran"), "[0, 1, 2]");
        assert_eq!(logged(&end.log, "answer"), format!("number {number}"));
        // The time between the template and its guests is none of theirs.
        let since: u64 = logged(&end.log, "since").parse().unwrap();
        assert!(since < 30_000, "{since} ms");
        randoms.push(logged(&end.log, "random").to_owned());
    }
    randoms.sort();
    randoms.dedup();
    assert_eq!(randoms.len(), 3, "guests with the same random numbers");
}

#[test]
fn a_template_of_another_machine_or_a_damaged_one_is_refused_and_the_machine_still_boots() {
    let _unchanged = Host::unchanged();
    let config = BootConfig {
        serial: false,
        ..config()
    };
    let mut machine = Machine::spawn();
    let template = machine.template_of_probe("prepared", config.clone());
    machine.client.shutdown().unwrap();
    let length = template.metadata().unwrap().len();
    let mut machine = Machine::spawn();
    let mut refused = |mode: &str, config: &BootConfig, what: &str| {
        let refusal = machine.restore_probe(mode, config.clone(), &template);
        let message = refusal.unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    };
    refused("power-off", &config, "cmdline differs");
    for (other, what) in [
        (
            BootConfig {
                vcpus: 2,
                ..config.clone()
            },
            "vcpus differs",
        ),
        (
            BootConfig {
                spare_slots: 1,
                ..config.clone()
            },
            "spare_slots differs",
        ),
        (
            BootConfig {
                memory_mib: 256,
                ..config.clone()
            },
            "damaged",
        ),
        (
            BootConfig {
                memory_mib: 64,
                ..config.clone()
            },
            "damaged",
        ),
    ] {
        refused("prepared", &other, what);
    }
    template.set_len(length - 1).unwrap();
    refused("prepared", &config, "not one of this version's");
    template.set_len(128 << 20).unwrap();
    refused("prepared", &config, "damaged");
    machine.boot_probe("power-off", config);
    assert_eq!(machine.wait().exit_code, exit_code::POWER_OFF);
}

/// Boots the agent and returns the connection that it opens when it is ready.
fn boot_agent(config: BootConfig) -> (Machine, UnixStream) {
    let mut machine = Machine::spawn();
    let listener = machine.listen(CONTROL_PORT);
    machine.boot_agent(config);
    let stream = machine.accept(&listener);
    stream.set_nonblocking(true).unwrap();
    (machine, stream)
}

/// A client of the agent at the other end; to be called in a tokio runtime.
fn agent_client(stream: UnixStream) -> AgentClient {
    let stream = tokio::net::UnixStream::from_std(stream).unwrap();
    AgentClient::new(ttrpc::asynchronous::Client::new(
        ttrpc::asynchronous::transport::Socket::from(stream),
    ))
}

#[test]
fn a_device_that_arrives_in_a_spare_slot_is_bound_by_the_agent() {
    let _unchanged = Host::unchanged();
    let config = BootConfig {
        spare_slots: 2,
        ..config()
    };
    let (mut machine, stream) = boot_agent(config);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let agent = agent_client(stream);
        let context = ttrpc::context::with_duration(std::time::Duration::from_secs(60));
        let hello = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            ..Default::default()
        };
        agent.hello(context.clone(), &hello).await.unwrap();
        for _ in 0..2 {
            let mmio_base = machine.client.attach(AttachConfig::Rng).unwrap();
            let request = BindDeviceRequest {
                mmio_base,
                ..Default::default()
            };
            let bound = agent.bind_device(context.clone(), &request).await.unwrap();
            assert!(bound.virtio_name.starts_with("virtio"), "{bound:?}");
        }
        let nothing = BindDeviceRequest {
            mmio_base: 0x1000,
            ..Default::default()
        };
        agent.bind_device(context, &nothing).await.unwrap_err();
    });
    assert!(
        matches!(
            machine.client.attach(AttachConfig::Rng),
            Err(ClientError::Refused(_))
        ),
        "both slots are taken"
    );
    machine.client.shutdown().unwrap();
}

#[test]
fn a_version_mismatch_is_refused_clearly() {
    let _unchanged = Host::unchanged();
    let (mut machine, stream) = boot_agent(config());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let agent = agent_client(stream);
        let context = ttrpc::context::with_duration(std::time::Duration::from_secs(60));
        let hello = HelloRequest {
            protocol_version: PROTOCOL_VERSION + 1,
            ..Default::default()
        };
        let error = agent.hello(context, &hello).await.unwrap_err().to_string();
        assert!(error.contains(&PROTOCOL_VERSION.to_string()), "{error}");
        assert!(
            error.contains(&(PROTOCOL_VERSION + 1).to_string()),
            "{error}"
        );
    });
    machine.client.shutdown().unwrap();
}
