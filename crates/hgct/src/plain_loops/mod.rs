//! Plain loops: the same layers in one framework alone, in the environment of its worker. What a
//! worker under hgct is compared with, in speed and in memory.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::Range;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use hgct_core::canonical::Hash;
use hgct_core::cluster::DeviceSpec;
use hgct_core::ids::DeviceId;
use hgct_core::model::ModelSpec;
use hgct_core::plan::Plan;
use hgct_core::schedule::Schedule;
use serde::{Deserialize, Serialize};

use crate::environments::Environments;
use crate::grants::{Held, Holder, pin};
use crate::process;
use crate::workspace::{Workspace, write_atomically};

const SCRIPTS: [(&str, &str); 5] = [
    ("plain_loop.py", include_str!("plain_loop.py")),
    ("torch_loop.py", include_str!("torch_loop.py")),
    ("jax_loop.py", include_str!("jax_loop.py")),
    ("paddle_loop.py", include_str!("paddle_loop.py")),
    ("mlx_loop.py", include_str!("mlx_loop.py")),
];

/// How long a loop may take to start, or for one measurement.
const PATIENCE: Duration = Duration::from_mins(5);

/// What a loop computes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Part {
    /// Layers of the model.
    pub(crate) layers: Range<u32>,
    /// Tokens a sample.
    pub(crate) seq_len: u32,
    /// Samples a micro-batch.
    pub(crate) micro_batch: u32,
    /// Micro-batches a step.
    pub(crate) num_micro_batches: u32,
    /// How many of them are in flight at most.
    pub(crate) in_flight: u32,
}

impl Part {
    /// All that a plan of one device and one stage has.
    pub(crate) fn of_one(plan: &Plan) -> Self {
        let pipeline = &plan.pipelines[0];
        Self {
            layers: 0..plan.model.num_placeable_layers(),
            seq_len: plan.seq_len,
            micro_batch: pipeline.micro_batch,
            num_micro_batches: pipeline.num_micro_batches,
            in_flight: 1,
        }
    }
}

/// What a loop answers to a measurement.
#[derive(Debug, Deserialize)]
pub(crate) struct Measured {
    /// Of each counted step.
    pub(crate) seconds: Vec<f64>,
    /// Largest resident memory since its framework was imported; 0 where it does not look.
    #[serde(default)]
    pub(crate) peak_bytes: u64,
}

/// A running loop.
pub(crate) struct PlainLoop {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<std::io::Result<String>>,
    /// Keeps the quota while the loop lives.
    held: Option<Held>,
}

impl PlainLoop {
    /// Whether there is one for a device: its engine has a loop and computes on the processor.
    pub(crate) fn is_known(device: &DeviceSpec) -> bool {
        let script = format!("{}_loop.py", device.engine);
        device.host_resource == "cpu" && SCRIPTS.iter().any(|(name, _)| *name == script)
    }

    /// Starts a loop on the cores of the device's grant. It is ready when [`PlainLoop::ready`] is.
    pub(crate) fn spawn(
        workspace: &Workspace,
        device: &DeviceSpec,
        model: &ModelSpec,
        tokens: &Path,
        part: &Part,
    ) -> Result<Self> {
        let folder = workspace.root().join("plain_loops");
        for (name, text) in SCRIPTS {
            write_atomically(&folder.join(name), text.as_bytes(), 0o644)?;
        }
        let config = folder.join(format!("config-{}.json", Hash::of(model).short()));
        write_atomically(&config, model.to_config_json().as_bytes(), 0o644)?;
        let environments = Environments::read(&workspace.root().join("environments.toml"))?;
        let environment = environments
            .get(&device.environment)
            .ok_or_else(|| anyhow!("no environment {}", device.environment))?;
        let mut command = environment.command(&BTreeMap::new(), device.grant.threads);
        let Part { layers, seq_len, micro_batch, num_micro_batches, in_flight } = part;
        let numbers = [&layers.start, &layers.end, seq_len, micro_batch, num_micro_batches, in_flight];
        command
            .arg(folder.join("plain_loop.py"))
            .arg(&device.engine)
            .arg(config)
            .arg(tokens.canonicalize()?)
            .args(numbers.map(ToString::to_string))
            .stderr(Stdio::null());
        Self::of(&mut command, &device.grant.cores)
    }

    /// Starts the loop that a command is, on these cores; none: on any.
    pub(crate) fn of(command: &mut Command, cores: &[u32]) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the plain loop")?;
        let orders = child.stdin.take().context("the plain loop has no input")?;
        let output = BufReader::new(child.stdout.take().context("the plain loop has no output")?);
        // In a thread of its own: a pipe has no deadline.
        let (sender, answers) = channel();
        std::thread::spawn(move || output.lines().try_for_each(|line| sender.send(line)));
        let this = Self { child, orders, answers, held: None };
        if !cores.is_empty() {
            pin(this.child.id(), cores)?;
        }
        Ok(this)
    }

    /// Waits until the framework is imported and the model is there.
    pub(crate) fn ready(&mut self) -> Result<()> {
        match self.line(PATIENCE)?.trim() {
            "ready" => Ok(()),
            other => bail!("the plain loop did not start: {other:?}"),
        }
    }

    /// Waits until it is ready, then holds it to the device's grant.
    pub(crate) fn hold(&mut self, device: &DeviceSpec) -> Result<()> {
        self.ready()?;
        let mut held = Holder::open()?.group(&format!("plain-{}", device.engine))?;
        held.join(self.child.id())?;
        held.set(device.grant.cpu_millicores)?;
        self.held = Some(held);
        Ok(())
    }

    /// Starts a loop, waits until it is ready, then holds it to the device's grant.
    pub(crate) fn start_held(
        workspace: &Workspace,
        device: &DeviceSpec,
        model: &ModelSpec,
        tokens: &Path,
        part: &Part,
    ) -> Result<Self> {
        let mut this = Self::spawn(workspace, device, model, tokens, part)?;
        this.hold(device)?;
        Ok(this)
    }

    /// Orders `steps` steps that count after `warm_up` others.
    pub(crate) fn order(&mut self, warm_up: u64, steps: u64) -> Result<()> {
        self.tell(&format!("{warm_up} {steps}"))
    }

    /// Orders what this loop alone may know.
    pub(crate) fn tell(&mut self, order: &str) -> Result<()> {
        writeln!(self.orders, "{order}").context("the plain loop has ended")
    }

    /// The answer to the oldest order.
    pub(crate) fn answer(&mut self) -> Result<Measured> {
        let line = self.line(PATIENCE)?;
        serde_json::from_str(&line).with_context(|| format!("the plain loop answered {line:?}"))
    }

    fn line(&mut self, patience: Duration) -> Result<String> {
        match self.answers.recv_timeout(patience) {
            Ok(line) => line.context("the plain loop cannot be read"),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the plain loop did not answer within {} s", patience.as_secs_f64())
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the plain loop ended with {}", process::describe(self.child.wait()?))
            }
        }
    }
}

impl Drop for PlainLoop {
    fn drop(&mut self) {
        // It may be inside of a step; nothing of it is wanted any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Largest memory of a plain loop for every rank of a plan that has a known one and one stage, with
/// the rank's layers and micro-batches in flight: kept, or measured side by side.
pub(crate) fn peaks(
    workspace: &Workspace,
    devices: &[DeviceSpec],
    plan: &Plan,
    tokens: &Path,
) -> Result<BTreeMap<DeviceId, u64>> {
    let mut peaks = BTreeMap::new();
    let mut running = Vec::new();
    for device in devices.iter().filter(|device| PlainLoop::is_known(device)) {
        let Some(part) = part(plan, &device.id)? else { continue };
        let key = Hash::of(&(&device.environment_hash, &device.engine, &plan.model, &part, SCRIPTS));
        if let Some(bytes) = workspace.cached::<u64>("plain_loops", &key) {
            peaks.insert(device.id.clone(), bytes);
            continue;
        }
        if running.is_empty() {
            eprintln!("memory: plain loops of the same frameworks side by side, about 10 s");
        }
        // What it holds does not depend on how fast it is: no quota.
        let plain = PlainLoop::spawn(workspace, device, &plan.model, tokens, &part)?;
        running.push((device, key, plain));
    }
    for (_, _, plain) in &mut running {
        plain.order(1, 1)?;
    }
    for (device, key, mut plain) in running {
        let measured = plain.ready().and_then(|()| plain.answer());
        let measured = measured.with_context(|| format!("the plain loop of {}", device.id))?;
        workspace.keep("plain_loops", &key, &measured.peak_bytes)?;
        peaks.insert(device.id.clone(), measured.peak_bytes);
    }
    Ok(peaks)
}

/// What a device computes under a plan, if that is one stage that a loop knows.
fn part(plan: &Plan, device: &DeviceId) -> Result<Option<Part>> {
    // The loops have a head of their own.
    if plan.model.tie_embeddings {
        return Ok(None);
    }
    let in_flight = Schedule::of(plan)?.dry_run(plan)?;
    let mut found = None;
    for pipeline in &plan.pipelines {
        for id in &pipeline.stages {
            let stage = plan.stage(*id);
            if plan.ranks[stage.rank().index()].device != *device {
                continue;
            }
            let part = Part {
                layers: stage.layers(),
                seq_len: plan.seq_len,
                micro_batch: pipeline.micro_batch,
                // Peak memory is reached with these; more only take time.
                num_micro_batches: pipeline.num_micro_batches.min(in_flight[id.index()] + 1),
                in_flight: in_flight[id.index()],
            };
            if found.replace(part).is_some() {
                return Ok(None);
            }
        }
    }
    Ok(found)
}

/// How much more a worker may take than a plain loop: 15 % or 64 MiB, whichever is more.
pub(crate) fn allowance_bytes(plain_loop_bytes: u64) -> u64 {
    (plain_loop_bytes * 15 / 100).max(64 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> PlainLoop {
        PlainLoop::of(Command::new("/bin/sh").args(["-c", script]), &[]).unwrap()
    }

    #[test]
    fn a_loop_that_hangs_or_ends_is_an_error() {
        let mut good = shell("echo ready; read order; echo \"{\\\"seconds\\\":[$order]}\"");
        good.ready().unwrap();
        good.tell("0.5").unwrap();
        assert_eq!(good.answer().unwrap().seconds, [0.5]);
        let error = shell("exec sleep 1000").line(Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.to_string(), "the plain loop did not answer within 0.2 s");
        let error = shell("kill -SEGV $$").ready().unwrap_err();
        assert_eq!(error.to_string(), "the plain loop ended with signal 11 (SIGSEGV)");
    }
}
