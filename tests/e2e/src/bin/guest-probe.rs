//! PID 1 of the guests that the machine's tests boot without an agent: does what `probe=` on the kernel's command line
//! says, reports on the serial console, and ends the VM.

// A probe that can't do its work ends the guest by a panic of PID 1, which the test sees as a reset.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use bulkhead_protocol::{
    BOOT_MARK_INIT, BOOT_MARK_PORT, BOOT_MARK_PREPARED, BOOT_MARK_READY, POWER_OFF_PORT,
};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

/// The probe echoes what connects here.
const ECHO_PORT: u32 = 7000;
/// The probe says "ready" here once it listens, then obeys the commands it is sent.
const COMMAND_PORT: u32 = 7001;
/// The probe dials this port as often as told.
const DIAL_PORT: u32 = 7002;
/// Nobody listens here on the host.
const DEAF_PORT: u32 = 7003;

fn main() {
    write_port(BOOT_MARK_PORT, BOOT_MARK_INIT);
    for (what, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(
            Some(what),
            target,
            Some(what),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
    }
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap();
    let mode = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("probe="))
        .unwrap_or("");
    write_port(BOOT_MARK_PORT, BOOT_MARK_READY);
    match mode {
        "power-off" => {}
        "reset" => drop(reboot(RebootMode::RB_AUTOBOOT)),
        "panic" => panic!("as told"),
        "report" => report(),
        "vsock" => vsock(),
        "prepared" => prepared(),
        "idle" => {
            println!("probe: idle");
            std::thread::park();
        }
        other => println!("probe: unknown mode {other:?}"),
    }
    // What the serial port has not sent yet is lost with the power.
    let _ = nix::sys::termios::tcdrain(std::io::stdout());
    write_port(POWER_OFF_PORT, 1);
}

/// Prints what the guest sees of its machine, one `key=value` a line.
fn report() {
    let read = |path: &str| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let cpuinfo = read("/proc/cpuinfo");
    let field = |name: &str| {
        let line = cpuinfo
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default();
        line.split_once(": ")
            .map_or("", |(_, value)| value)
            .to_owned()
    };
    println!("probe: cpus={}", read("/sys/devices/system/cpu/online"));
    println!("probe: cores={}", field("cpu cores"));
    println!("probe: siblings={}", field("siblings"));
    let flags = field("flags");
    for flag in ["x2apic", "hypervisor", "tsc_deadline_timer"] {
        println!(
            "probe: {flag}={}",
            flags.split(' ').any(|have| have == flag)
        );
    }
    println!(
        "probe: clocksource={}",
        read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    );
    println!(
        "probe: cpuidle={}",
        read("/sys/devices/system/cpu/cpuidle/current_driver")
    );
    println!(
        "probe: rng={}",
        read("/sys/class/misc/hw_random/rng_current")
    );
    let mut random = [0; 512];
    fs::File::open("/dev/hwrng")
        .unwrap()
        .read_exact(&mut random)
        .unwrap();
    println!(
        "probe: random={}",
        random.iter().any(|byte| *byte != random[0])
    );
    let memory = read("/proc/meminfo");
    println!(
        "probe: memory_kib={}",
        memory.split_whitespace().nth(1).unwrap_or_default()
    );
    if let Ok(mut console) = fs::OpenOptions::new().write(true).open("/dev/hvc0") {
        console
            .write_all(b"hello from the virtio console\n")
            .unwrap();
    }
}

/// Says that it is prepared, where guests made from a template begin, and then what has become of clocks, processors and devices.
fn prepared() {
    let before = Instant::now();
    write_port(BOOT_MARK_PORT, BOOT_MARK_PREPARED);
    println!("probe: since={}", before.elapsed().as_millis());
    let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
    let ran: Vec<_> = (0..cpus.unwrap().unwrap_or(1) as usize)
        .map(|cpu| std::thread::spawn(move || run_on(cpu)).join().unwrap())
        .collect();
    println!("probe: ran={ran:?}");
    let mut random = [0; 64];
    fs::File::open("/dev/hwrng")
        .unwrap()
        .read_exact(&mut random)
        .unwrap();
    println!("probe: random={random:x?}");
    let mut stream = dial(DIAL_PORT).unwrap();
    stream.write_all(b"call").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    println!("probe: answer={answer}");
}

/// Lets a timer pass on one processor; returns which that was.
fn run_on(cpu: usize) -> i32 {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    // SAFETY: takes no argument.
    unsafe { libc::sched_getcpu() }
}

fn vsock() {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, ECHO_PORT).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            small_thread(move || echo(stream));
        }
    });
    let mut commands = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, COMMAND_PORT).unwrap();
    commands.write_all(b"ready\n").unwrap();
    let mut command = [0];
    while commands.read(&mut command).unwrap() == 1 {
        match command[0] {
            // A hundred connections open at once, each sending its number and half-closed, each answered.
            b'd' => {
                let mut streams: Vec<_> = (0..100u32)
                    .map(|number| (number, dial(DIAL_PORT).unwrap()))
                    .collect();
                for (number, stream) in &mut streams {
                    stream.write_all(&number.to_be_bytes()).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                }
                for (number, stream) in &mut streams {
                    let mut answer = Vec::new();
                    stream.read_to_end(&mut answer).unwrap();
                    assert_eq!(answer, number.to_le_bytes());
                }
                commands.write_all(b"done\n").unwrap();
            }
            b'r' => {
                let error = dial(DEAF_PORT).unwrap_err();
                writeln!(commands, "{:?}", error.kind()).unwrap();
            }
            other => panic!("unknown command {other}"),
        }
    }
}

fn dial(port: u32) -> std::io::Result<VsockStream> {
    let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    Ok(stream)
}

fn echo(mut stream: VsockStream) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                if stream.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
        }
    }
    // The peer may be gone already.
    let _ = stream.shutdown(Shutdown::Write);
}

/// Hundreds of these live at once in a small guest.
fn small_thread(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new()
        .stack_size(64 * 1024)
        .spawn(work)
        .unwrap();
}

/// Writes one byte to an I/O port.
fn write_port(port: u16, value: u8) {
    // SAFETY: the ports written here belong to the VMM's power button and boot marks, which touch no memory; PID 1 of a guest may open
    // them, and `out` reads registers only.
    unsafe {
        assert_eq!(libc::ioperm(port.into(), 1, 1), 0);
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}
