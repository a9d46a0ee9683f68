//! The scope in which systemd puts a sandbox: asked for over D-Bus (org.freedesktop.systemd1(5)), with the properties that runc
//! gives its own. Every question has a connection to itself, which nobody inherits and which is closed with the answer.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::limits::{BFQ_WEIGHT, write_file};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zbus::message::Type;
use zbus::zvariant::{DynamicType, OwnedObjectPath, OwnedValue, Value};
use zbus::{Connection, MatchRule, Message, MessageStream};

/// How long systemd may take for what it is asked; runc gives it as long.
const PATIENCE: Duration = Duration::from_secs(30);

/// The first version that knows of idle cgroups, and says so whenever it sets a weight.
const IDLE_SINCE: u32 = 252;

/// Longest name of a unit (systemd.unit(5)).
const MAX_NAME: usize = 255;

const SYSTEMD: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// What came of a question.
#[derive(Debug, Error)]
pub enum SystemdError {
    /// There is nobody to ask.
    #[error("cannot reach systemd over D-Bus (is this host run by it, with a system bus?): {0}")]
    Unreachable(zbus::Error),
    /// The question went wrong.
    #[error("systemd: {0}")]
    Call(#[from] zbus::Error),
    /// A unit of that name is somebody else's.
    #[error("systemd has a unit of that name")]
    Exists,
    /// What was begun has not become what it was to be.
    #[error("systemd has not done it: the job's result is {0:?}")]
    Job(String),
    /// No answer.
    #[error("systemd does not answer within {} s", PATIENCE.as_secs())]
    Silent,
    /// This process has no means to ask.
    #[error("cannot ask systemd: {0}")]
    Io(#[from] io::Error),
}

/// A scope, by its name and the slice that it is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    name: String,
    slice: String,
}

impl Unit {
    /// That of a `slice:prefix:name`; without a slice it is in `system.slice`.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let [slice, prefix, name] = text.split(':').collect::<Vec<_>>()[..] else {
            return Err("must be \"slice:prefix:name\" with --systemd-cgroup");
        };
        if name.ends_with(".slice") {
            return Err("names a slice: a container is in a scope, whose name has no ending");
        }
        let name = format!("{prefix}-{name}.scope");
        let allowed = |text: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
            text.len() <= MAX_NAME && text.chars().all(allowed)
        };
        if !allowed(&name) {
            return Err("makes no name for a unit of systemd: letters, digits and -_.\\@ do");
        }
        let slice = if slice.is_empty() {
            "system.slice"
        } else {
            slice
        };
        if !allowed(slice) || slices(slice).is_none() {
            return Err(
                "names no slice of systemd: it must end in .slice, each dash with a name on both sides",
            );
        }
        Ok(Self {
            name,
            slice: slice.to_owned(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its cgroup.
    pub fn path(&self) -> PathBuf {
        slices(&self.slice).unwrap_or_default().join(&self.name)
    }

    /// Tells whether somebody else has a unit of that name, in whatever slice.
    pub fn require_free(&self) -> Result<(), SystemdError> {
        ask(
            async |systemd| match systemd.state(&self.name).await?.as_deref() {
                // What is left of a unit makes room for another.
                None | Some("inactive" | "failed") => Ok(()),
                Some(_) => Err(SystemdError::Exists),
            },
        )
    }

    /// Makes it, with a process in it, and with further properties, which win.
    pub fn start(
        &self,
        description: &str,
        pid: u32,
        further: Vec<(String, Value<'_>)>,
    ) -> Result<(), SystemdError> {
        let mut properties: Vec<(&str, Value<'_>)> = vec![
            ("Description", description.into()),
            ("Slice", self.slice.as_str().into()),
            ("Delegate", true.into()),
            ("PIDs", vec![pid].into()),
            ("MemoryAccounting", true.into()),
            ("CPUAccounting", true.into()),
            ("IOAccounting", true.into()),
            ("TasksAccounting", true.into()),
            ("DefaultDependencies", false.into()),
        ];
        let (names, values): (Vec<String>, Vec<Value<'_>>) = further.into_iter().unzip();
        properties.extend(names.iter().map(String::as_str).zip(values));
        // No other units come with it.
        let others: [(&str, Vec<(&str, Value<'_>)>); 0] = [];
        ask(async |systemd| {
            let body = (self.name.as_str(), "replace", properties, &others[..]);
            let mut result = systemd.job(&self.name, "StartTransientUnit", &body).await;
            if matches!(result, Err(SystemdError::Exists)) {
                // One that has failed is kept for somebody to look at.
                systemd.forget(&self.name).await;
                result = systemd.job(&self.name, "StartTransientUnit", &body).await;
            }
            match result?.as_str() {
                "done" => Ok(()),
                other => {
                    systemd.forget(&self.name).await;
                    Err(SystemdError::Job(other.to_owned()))
                }
            }
        })
    }

    /// Has systemd keep to what the files of the cgroup, which is at `directory`, say.
    ///
    /// It writes them by its own properties when it is reloaded, and all of a kind when one of that is changed, so it has to know
    /// them. What it can't know as exactly as they were set is put back.
    pub fn keep(&self, directory: &Path) -> Result<(), SystemdError> {
        let files = Files::read(directory);
        ask(async |systemd| {
            let knows_idle = files.idle() && systemd.version().await? >= IDLE_SINCE;
            let properties = files.properties(knows_idle);
            let body = (self.name.as_str(), true, properties);
            systemd.call(MANAGER, "SetUnitProperties", &body).await?;
            // It writes the files after its answer, and before it looks at the next question.
            systemd
                .call("org.freedesktop.DBus.Peer", "Ping", &())
                .await?;
            Ok(())
        })?;
        Ok(files.restore(directory)?)
    }

    /// Stops it, and waits until that is done; there need not be any.
    pub fn stop(&self) -> Result<(), SystemdError> {
        ask(async |systemd| {
            let body = (self.name.as_str(), "replace");
            match systemd.job(&self.name, "StopUnit", &body).await {
                Ok(result) if result != "done" => {
                    tracing::warn!(
                        unit = self.name,
                        result,
                        "systemd has not stopped the scope"
                    );
                }
                Err(SystemdError::Call(error)) if is(&error, "NoSuchUnit") => {}
                result => {
                    result?;
                }
            }
            systemd.forget(&self.name).await;
            Ok(())
        })
    }
}

/// Where the cgroup of a slice is: that of `a-b.slice` is in that of `a.slice` (systemd.slice(5)).
fn slices(slice: &str) -> Option<PathBuf> {
    let mut path = PathBuf::from("/");
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(path);
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    Some(path)
}

/// Connects, asks and disconnects, on this thread: not one that has other things to do.
fn ask<T>(
    question: impl AsyncFnOnce(&Systemd) -> Result<T, SystemdError>,
) -> Result<T, SystemdError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let asked = async {
        let connected = Connection::system().await;
        question(&Systemd(connected.map_err(SystemdError::Unreachable)?)).await
    };
    let answer = async { tokio::time::timeout(PATIENCE, asked).await };
    runtime
        .block_on(answer)
        .unwrap_or(Err(SystemdError::Silent))
}

/// A connection to it.
struct Systemd(Connection);

impl Systemd {
    async fn call<B: Serialize + DynamicType>(
        &self,
        interface: &str,
        method: &str,
        body: &B,
    ) -> zbus::Result<Message> {
        self.0
            .call_method(Some(SYSTEMD), OBJECT, Some(interface), method, body)
            .await
    }

    /// Has it do something with a unit, and waits for that to be done; returns the job's result.
    async fn job<B: Serialize + DynamicType>(
        &self,
        unit: &str,
        method: &str,
        body: &B,
    ) -> Result<String, SystemdError> {
        let ends = MatchRule::builder()
            .msg_type(Type::Signal)
            .sender(SYSTEMD)?
            .path(OBJECT)?
            .interface(MANAGER)?
            .member("JobRemoved")?
            .arg(2, unit)?
            .build();
        // Before the job begins, or its end may be missed.
        let mut ends = MessageStream::for_match_rule(ends, &self.0, None).await?;
        let begun = match self.call(MANAGER, method, body).await {
            Err(error) if is(&error, "UnitExists") => return Err(SystemdError::Exists),
            begun => begun?,
        };
        let job: OwnedObjectPath = begun.body().deserialize()?;
        while let Some(end) = ends.next().await {
            let end = end?;
            // The rule names systemd as the sender, but what is sent to this connection alone comes past all rules.
            if end.header().sender() != begun.header().sender() {
                continue;
            }
            let (_, ended, _, result): (u32, OwnedObjectPath, String, String) =
                end.body().deserialize()?;
            if ended == job {
                return Ok(result);
            }
        }
        Err(SystemdError::Silent)
    }

    /// What a unit is doing; none if it knows none of that name.
    async fn state(&self, unit: &str) -> Result<Option<String>, SystemdError> {
        let found = match self.call(MANAGER, "GetUnit", &unit).await {
            Err(error) if is(&error, "NoSuchUnit") => return Ok(None),
            found => found?,
        };
        let object: OwnedObjectPath = found.body().deserialize()?;
        let state = self
            .property(
                object.as_str(),
                "org.freedesktop.systemd1.Unit",
                "ActiveState",
            )
            .await?;
        Ok(Some(state))
    }

    /// Its version's first number.
    async fn version(&self) -> Result<u32, SystemdError> {
        let version = self.property(OBJECT, MANAGER, "Version").await?;
        let digits = version.trim_start_matches(|c: char| !c.is_ascii_digit());
        let end = digits.find(|c: char| !c.is_ascii_digit());
        let number = digits
            .get(..end.unwrap_or(digits.len()))
            .unwrap_or_default();
        Ok(number.parse().unwrap_or(0))
    }

    async fn property(
        &self,
        object: &str,
        interface: &str,
        name: &str,
    ) -> Result<String, SystemdError> {
        let properties = Some("org.freedesktop.DBus.Properties");
        let answer = self
            .0
            .call_method(Some(SYSTEMD), object, properties, "Get", &(interface, name))
            .await?;
        let value: OwnedValue = answer.body().deserialize()?;
        Ok(String::try_from(value).map_err(zbus::Error::from)?)
    }

    /// Lets it forget a unit that has failed.
    async fn forget(&self, unit: &str) {
        let forgotten = self.call(MANAGER, "ResetFailedUnit", &unit).await;
        if let Err(error) = forgotten
            && !is(&error, "NoSuchUnit")
        {
            tracing::debug!(unit, %error, "systemd keeps what is left of the scope");
        }
    }
}

/// Whether it is systemd's error of that name.
fn is(error: &zbus::Error, name: &str) -> bool {
    let zbus::Error::MethodError(told, ..) = error else {
        return false;
    };
    told.strip_prefix(SYSTEMD)
        .and_then(|told| told.strip_prefix('.'))
        == Some(name)
}

/// What the files say that systemd writes too; a file's first line is for all devices.
#[derive(Debug)]
struct Files(BTreeMap<&'static str, String>);

impl Files {
    fn read(directory: &Path) -> Self {
        let files = [
            "cpu.idle",
            "cpu.max",
            "cpu.weight",
            "cpuset.cpus",
            "cpuset.mems",
            BFQ_WEIGHT,
            "io.weight",
            "memory.max",
        ];
        let read = |file| Some((file, first_line(directory, file).ok()?));
        Self(files.into_iter().filter_map(read).collect())
    }

    fn get(&self, file: &str) -> Option<&str> {
        self.0.get(file).map(String::as_str)
    }

    fn idle(&self) -> bool {
        self.get("cpu.idle") == Some("1")
    }

    /// As properties (systemd.resource-control(5)).
    fn properties(&self, knows_idle: bool) -> Vec<(&'static str, Value<'static>)> {
        let mut properties = Vec::new();
        if let Some(bytes) = self.get("memory.max").and_then(number_or_max) {
            properties.push(("MemoryMax", bytes.into()));
        }
        match self.get("cpu.weight").and_then(number_or_max) {
            _ if knows_idle => properties.push(("CPUWeight", 0_u64.into())),
            Some(weight @ 1..) => properties.push(("CPUWeight", weight.into())),
            _ => {}
        }
        if let Some((quota, period)) = self.get("cpu.max").and_then(cpu_time) {
            properties.push(("CPUQuotaPeriodUSec", period.into()));
            properties.push(("CPUQuotaPerSecUSec", quota.into()));
        }
        for (file, name) in [
            ("cpuset.cpus", "AllowedCPUs"),
            ("cpuset.mems", "AllowedMemoryNodes"),
        ] {
            if let Some(mask) = self.get(file).and_then(mask) {
                properties.push((name, mask.into()));
            }
        }
        let weight = |file| {
            self.get(file)?
                .strip_prefix("default ")?
                .parse::<u64>()
                .ok()
        };
        if let Some(weight) = weight(BFQ_WEIGHT).map(io_weight).or(weight("io.weight")) {
            properties.push(("IOWeight", weight.into()));
        }
        properties
    }

    /// Writes what is no longer so.
    fn restore(&self, directory: &Path) -> io::Result<()> {
        for (file, text) in &self.0 {
            // An idle cgroup's weight is shown as 0, and can't be set.
            if text.is_empty() || (*file == "cpu.weight" && self.idle()) {
                continue;
            }
            if first_line(directory, file)? != *text {
                write_file(&directory.join(file), text)?;
            }
        }
        Ok(())
    }
}

fn first_line(directory: &Path, file: &str) -> io::Result<String> {
    let text = fs::read_to_string(directory.join(file))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// systemd has the largest number for "max".
fn number_or_max(text: &str) -> Option<u64> {
    if text == "max" {
        return Some(u64::MAX);
    }
    text.parse().ok()
}

/// A quota and its period as microseconds a second, in steps of a hundredth of a processor, rounded up, and the period.
fn cpu_time(max: &str) -> Option<(u64, u64)> {
    const SECOND: u64 = 1_000_000;
    const STEP: u64 = SECOND / 100;
    let (quota, period) = max.split_once(' ')?;
    let period: u64 = period.parse().ok()?;
    let quota = match number_or_max(quota)? {
        u64::MAX => u64::MAX,
        quota => {
            let time = quota.saturating_mul(SECOND).checked_div(period)?;
            time.div_ceil(STEP).saturating_mul(STEP)
        }
    };
    Some((quota, period))
}

/// A list such as `0-3,7` as bits, the lowest first; none of an empty one.
fn mask(list: &str) -> Option<Vec<u8>> {
    /// More than the kernel has processors or nodes for.
    const MOST: usize = 1 << 16;
    let mut mask = Vec::new();
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        for bit in first..=last.min(MOST) {
            if mask.len() <= bit / 8 {
                mask.resize(bit / 8 + 1, 0);
            }
            if let Some(byte) = mask.get_mut(bit / 8) {
                *byte |= 1 << (bit % 8);
            }
        }
    }
    (!mask.is_empty()).then_some(mask)
}

/// The weight from which systemd makes this one of BFQ's, whose scale is as long below 100 and shorter above.
fn io_weight(bfq: u64) -> u64 {
    match bfq {
        ..=100 => bfq,
        _ => 100 + (bfq - 100) * 11,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_three_parts_names_a_scope_in_a_slice() {
        for (text, name, path) in [
            (
                "system.slice:docker:1",
                "docker-1.scope",
                "/system.slice/docker-1.scope",
            ),
            (
                ":bulkhead:c_1",
                "bulkhead-c_1.scope",
                "/system.slice/bulkhead-c_1.scope",
            ),
            ("-.slice:a:b", "a-b.scope", "/a-b.scope"),
            (
                "kubepods-burstable-pod1_2.slice:cri-containerd:5f",
                "cri-containerd-5f.scope",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-5f.scope",
            ),
        ] {
            let unit = Unit::parse(text).unwrap();
            assert_eq!(unit.name(), name);
            assert_eq!(unit.path(), Path::new(path));
        }
        for text in [
            "/a/b",
            "a:b",
            "a.slice:b:c:d",
            "a:b:c",
            ".slice:b:c",
            "a--b.slice:b:c",
            "-a.slice:b:c",
            "a/../b.slice:b:c",
            "a.slice:b:../c",
            "a.slice:b:c+d",
            "a.slice:b:c.slice",
        ] {
            assert!(Unit::parse(text).is_err(), "{text}");
        }
        assert!(Unit::parse(&format!("a.slice:b:{}", "c".repeat(250))).is_err());
    }

    fn properties(files: &[(&str, &str)], knows_idle: bool) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        for (file, text) in files {
            fs::write(directory.path().join(file), text).unwrap();
        }
        let properties = Files::read(directory.path()).properties(knows_idle);
        let text = |(name, value)| format!("{name}={value:?}");
        properties.into_iter().map(text).collect()
    }

    fn expected(properties: &[(&str, Value<'_>)]) -> Vec<String> {
        let text = |(name, value): &(&str, Value<'_>)| format!("{name}={value:?}");
        properties.iter().map(text).collect()
    }

    #[test]
    fn systemd_is_told_what_the_files_say() {
        let files = [
            ("memory.max", "201326592\n"),
            ("cpu.weight", "20\n"),
            ("cpu.idle", "0\n"),
            ("cpu.max", "12345 100000\n"),
            ("cpuset.cpus", "0-1,20\n"),
            ("cpuset.mems", "\n"),
            ("io.weight", "default 2930\n8:0 50\n"),
        ];
        assert_eq!(
            properties(&files, false),
            expected(&[
                ("MemoryMax", 201_326_592_u64.into()),
                ("CPUWeight", 20_u64.into()),
                ("CPUQuotaPeriodUSec", 100_000_u64.into()),
                ("CPUQuotaPerSecUSec", 130_000_u64.into()),
                ("AllowedCPUs", vec![3_u8, 0, 16].into()),
                ("IOWeight", 2930_u64.into()),
            ])
        );
        let files = [
            ("memory.max", "max\n"),
            ("cpu.weight", "0\n"),
            ("cpu.idle", "1\n"),
            ("cpu.max", "max 50000\n"),
            ("io.weight", "default 100\n"),
            (BFQ_WEIGHT, "default 300\n"),
        ];
        let common = |idle: &[(&str, Value<'_>)]| {
            let mut all = expected(&[("MemoryMax", u64::MAX.into())]);
            all.extend(expected(idle));
            all.extend(expected(&[
                ("CPUQuotaPeriodUSec", 50_000_u64.into()),
                ("CPUQuotaPerSecUSec", u64::MAX.into()),
                ("IOWeight", 2300_u64.into()),
            ]));
            all
        };
        assert_eq!(properties(&files, false), common(&[]));
        assert_eq!(
            properties(&files, true),
            common(&[("CPUWeight", 0_u64.into())])
        );
    }

    #[test]
    fn what_systemd_has_written_otherwise_is_put_back() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        write("cpu.max", "12345 100000\n");
        write("cpuset.cpus", "\n");
        let files = Files::read(directory.path());
        write("cpu.max", "13000 100000\n");
        files.restore(directory.path()).unwrap();
        let read = |file: &str| fs::read_to_string(directory.path().join(file)).unwrap();
        assert!(read("cpu.max").starts_with("12345 100000"));
        assert_eq!(read("cpuset.cpus"), "\n");
    }

    #[test]
    fn a_host_without_systemd_says_so_at_once() {
        crate::share::tests::in_namespace(|| {
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(None::<&str>, "/run", Some("tmpfs"), flags, None::<&str>).unwrap();
            let unit = Unit::parse(":e2e:x").unwrap();
            let error = unit.require_free().unwrap_err();
            assert!(matches!(error, SystemdError::Unreachable(_)), "{error}");
        });
    }
}
