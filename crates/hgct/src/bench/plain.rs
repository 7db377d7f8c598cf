//! The plain PyTorch loop, in the environment and under the quota of the torch worker.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context as _, Result, anyhow, bail};
use hgct_core::cluster::DeviceSpec;

use crate::environments::Environments;
use crate::grants::{Held, Holder, pin};
use crate::workspace::Workspace;

const SCRIPT: &str = include_str!("plain_torch.py");

/// A running loop.
pub(super) struct PlainLoop {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Keeps the quota while the loop lives.
    held: Held,
}

impl PlainLoop {
    /// Starts the loop, waits until its framework is imported, then holds it to the device's grant.
    pub(super) fn start(
        workspace: &Workspace,
        device: &DeviceSpec,
        config: &Path,
        tokens: &Path,
        shape: (u32, u32, u32),
    ) -> Result<Self> {
        let script = workspace.root().join("bench/plain_torch.py");
        crate::workspace::write_atomically(&script, SCRIPT.as_bytes(), 0o644)?;
        let environments = Environments::read(&workspace.root().join("environments.toml"))?;
        let environment = environments
            .get(&device.environment)
            .ok_or_else(|| anyhow!("no environment {}", device.environment))?;
        let (seq_len, micro_batch, num_micro_batches) = shape;
        let mut command = environment.command(&std::collections::BTreeMap::new(), device.grant.threads);
        command
            .arg(&script)
            .arg(config.canonicalize()?)
            .arg(tokens.canonicalize()?)
            .args([seq_len, micro_batch, num_micro_batches].map(|n| n.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the plain loop")?;
        let orders = child.stdin.take().context("the plain loop has no input")?;
        let answers = BufReader::new(child.stdout.take().context("the plain loop has no output")?);
        let mut held = Holder::open()?.group("plain-torch", None)?;
        held.join(child.id())?;
        pin(child.id(), &device.grant.cores)?;
        let mut this = Self { child, orders, answers, held };
        if this.line()?.trim() != "ready" {
            bail!("the plain loop did not start");
        }
        this.held.set(device.grant.cpu_millicores)?;
        Ok(this)
    }

    /// Seconds of each of `steps` steps after `warm_up` others.
    pub(super) fn measure(&mut self, warm_up: u64, steps: u64) -> Result<Vec<f64>> {
        writeln!(self.orders, "{warm_up} {steps}").context("the plain loop has ended")?;
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("the plain loop answered {line:?}"))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("the plain loop cannot be read")?;
        if line.is_empty() {
            bail!("the plain loop ended: {:?}", self.child.wait()?);
        }
        Ok(line)
    }
}

impl Drop for PlainLoop {
    fn drop(&mut self) {
        // It may be inside of a step; nothing of it is wanted any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
