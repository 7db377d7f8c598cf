//! `hgct-worker-burn --probe`: which adapters there are and whether each computes, as one line of
//! JSON in the form of the other frameworks' probe.
//!
//! A driver may crash or hang at its first kernel, so each adapter is tried in a process of its
//! own; what comes of that is a reason like any other.

use std::io::Read as _;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use burn_tensor::Tensor;
use serde_json::{Value, json};

use crate::adapter::{self, API};
use crate::error::guarded;
use crate::{BURN_VERSION, BurnEngine};

/// How long an adapter may take to compile and run its first kernel.
const PATIENCE: Duration = Duration::from_secs(40);

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
    let rows: Vec<Value> = (0..)
        .zip(&adapters)
        .map(|(index, adapter)| {
            let trouble = adapter.lacks().or_else(|| run_try(&adapter.device_string).err());
            json!({
                "index": index,
                "device": adapter.device_string,
                "name": adapter.name,
                "uuid": null,
                "pci": adapter.pci,
                "memory_bytes": adapter.memory_bytes,
                "driver": adapter.driver,
                "software": adapter.software,
                "error": trouble,
            })
        })
        .collect();
    json!({ "version": BURN_VERSION, "devices": rows, "libraries": [] }).to_string()
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
    let mut child = Command::new(program)
        .args(["--try", device_string])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("a child process does not start: {error}"))?;
    // Read beside: a full pipe must not be what hangs.
    let said = child.stderr.take().map(|mut pipe| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })
    });
    let end = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(10)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
        }
    };
    let said = said.and_then(|reader| reader.join().ok()).unwrap_or_default();
    judge(status, &said)
}

fn judge(status: Option<ExitStatus>, said: &str) -> Result<(), String> {
    let last = said.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no words");
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) if status.code() == Some(1) => Err(last.to_owned()),
        Some(status) => Err(format!("its driver crashed at the first kernel ({status}): {last}")),
        None => Err(format!("its first kernel did not end within {} s", PATIENCE.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn what_a_driver_does_at_its_first_kernel_is_a_reason() {
        let of = |raw, said| judge(Some(ExitStatus::from_raw(raw)), said).unwrap_err();
        assert_eq!(of(1 << 8, "note\nits limit is too low\n"), "its limit is too low");
        assert!(of(11, "").contains("crashed at the first kernel (signal: 11"));
        assert!(judge(None, "").unwrap_err().contains("did not end within 40 s"));
        assert_eq!(judge(Some(ExitStatus::from_raw(0)), "warnings"), Ok(()));
    }
}
