//! `hgct-worker-burn --probe`: which adapters there are and whether each computes, as one line of
//! JSON in the form of the other frameworks' probe.
//!
//! A driver may crash or hang at its first kernel, so each adapter is tried in a process of its
//! own; what comes of that is a reason like any other.

use std::io::Read as _;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use burn_tensor::Tensor;
use serde_json::{Value, json};

use crate::adapter::{self, API, Adapter};
use crate::error::guarded;
use crate::{BURN_VERSION, BurnEngine};

/// How long an adapter may take to compile and run its first kernel. Who asks waits a minute.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long the last words of a child that has ended may still take to arrive.
const DRAIN: Duration = Duration::from_millis(500);

/// Says which adapters are offered, by vendor and device id: `10de:2330,8086:4680`. Not set: all.
const WANTED: &str = "HGCT_VULKAN_ADAPTERS";

/// The answer for all adapters.
pub fn answer() -> String {
    let adapters = match guarded("list adapters", || Ok(adapter::list())) {
        Ok(adapters) => adapters,
        Err(error) => return json!({ "version": BURN_VERSION, "error": error.to_string() }).to_string(),
    };
    if adapters.is_empty() {
        let error =
            format!("no {API} driver lists an adapter here (on Debian: apt-get install mesa-vulkan-drivers)");
        return json!({ "version": BURN_VERSION, "error": error }).to_string();
    }
    let wanted = std::env::var(WANTED).ok();
    // Side by side: one that hangs takes no time from the others.
    let rows: Vec<Value> = std::thread::scope(|scope| {
        let tries: Vec<_> = adapters
            .iter()
            .map(|adapter| (adapter, asked_for(wanted.as_deref(), &adapter.device_string)))
            .map(|(adapter, asked)| (adapter, asked, scope.spawn(move || trouble(adapter, asked))))
            .collect();
        let rows = (0..).zip(tries).map(|(index, (adapter, asked, trouble))| {
            let trouble = trouble.join().unwrap_or_else(|_| Some("its try failed inside of hgct".into()));
            row(index, adapter, asked == Some(true), trouble.as_deref())
        });
        rows.collect()
    });
    json!({ "version": BURN_VERSION, "devices": rows, "libraries": [] }).to_string()
}

fn row(index: u32, adapter: &Adapter, asked_for: bool, trouble: Option<&str>) -> Value {
    json!({
        "index": index,
        "device": adapter.device_string,
        "name": adapter.name,
        "uuid": adapter.uuid,
        "pci": adapter.pci,
        "memory_bytes": adapter.memory_bytes,
        "driver": adapter.driver,
        "software": adapter.software,
        "asked_for": asked_for,
        "error": trouble,
    })
}

/// Whether `wanted` names an adapter; `None`: it says nothing.
fn asked_for(wanted: Option<&str>, device_string: &str) -> Option<bool> {
    let ids: Vec<&str> = device_string.split(':').skip(1).take(2).collect();
    let ids = ids.join(":");
    Some(wanted?.split(',').any(|name| name.trim().eq_ignore_ascii_case(&ids)))
}

/// Why an adapter cannot be used, if it cannot.
fn trouble(adapter: &Adapter, asked_for: Option<bool>) -> Option<String> {
    if asked_for == Some(false) {
        return Some(format!("hidden by {WANTED}"));
    }
    adapter.lacks().or_else(|| run_try(&adapter.device_string).err())
}

/// `--try DEVICE`: opens the adapter and adds the product of two 2×2 matrices of ones.
pub fn try_adapter(device_string: &str) -> Result<(), String> {
    let engine = BurnEngine::open(device_string).map_err(|error| error.to_string())?;
    let sum = guarded("try", || {
        let ones = Tensor::<2>::ones([2, 2], engine.device());
        Ok(ones.clone().matmul(ones).sum().into_data().as_slice::<f32>().map(|sum| sum[0]))
    });
    match sum.map_err(|error| error.to_string())? {
        Ok(8.0) => Ok(()),
        Ok(sum) => Err(format!("{device_string} adds eight ones to {sum}")),
        Err(error) => Err(error.to_string()),
    }
}

/// Tries an adapter in a child process.
fn run_try(device_string: &str) -> Result<(), String> {
    let program = std::env::current_exe().map_err(|error| format!("this program is not found: {error}"))?;
    run_bounded(Command::new(program).args(["--try", device_string]), PATIENCE)
}

/// Runs a command to its end, or gives it up after `patience`. What it says last is the reason.
fn run_bounded(command: &mut Command, patience: Duration) -> Result<(), String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("a child process does not start: {error}"))?;
    let (sender, said) = channel();
    // Read beside: a full pipe must not be what hangs, nor one that something else holds open.
    if let Some(mut pipe) = child.stderr.take() {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.read_to_end(&mut text);
            let _ = sender.send(String::from_utf8_lossy(&text).into_owned());
        });
    }
    let end = Instant::now() + patience;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(10)),
            _ => {
                // Not waited for: inside of a driver that hangs a process does not even die.
                let _ = child.kill();
                break None;
            }
        }
    };
    judge(status, &said.recv_timeout(DRAIN).unwrap_or_default(), patience)
}

fn judge(status: Option<ExitStatus>, said: &str, patience: Duration) -> Result<(), String> {
    let last = said.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no words");
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) if status.code() == Some(1) => Err(last.to_owned()),
        Some(status) => Err(format!("its driver crashed at the first kernel ({status}): {last}")),
        None => Err(format!("its first kernel did not end within {} s", patience.as_secs_f64())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn what_a_driver_does_at_its_first_kernel_is_a_reason() {
        let of = |raw, said| judge(Some(ExitStatus::from_raw(raw)), said, PATIENCE).unwrap_err();
        assert_eq!(of(1 << 8, "note\nits limit is too low\n"), "its limit is too low");
        assert!(of(11, "").contains("crashed at the first kernel (signal: 11"));
        assert_eq!(judge(Some(ExitStatus::from_raw(0)), "warnings", PATIENCE), Ok(()));
    }

    #[test]
    fn a_try_that_never_ends_is_given_up() {
        let begun = Instant::now();
        // Its own child holds the pipe open for longer.
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 20 & exec sleep 20"]);
        let error = run_bounded(&mut command, Duration::from_millis(200)).unwrap_err();
        assert_eq!(error, "its first kernel did not end within 0.2 s");
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn which_adapters_are_offered_can_be_said() {
        let asked = |wanted| asked_for(wanted, "vulkan:10de:2330:0");
        assert_eq!(asked(None), None);
        assert_eq!(asked(Some("")), Some(false));
        assert_eq!(asked(Some("8086:4680, 10DE:2330")), Some(true));
    }
}
