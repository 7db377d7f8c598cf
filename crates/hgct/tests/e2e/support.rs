//! Folders, jobs, plans and processes of the tests.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hgct_core::cluster::Grant;
use hgct_core::ids::{DeviceId, Kind, NodeId, Rank};
use hgct_core::model::ModelSpec;
use hgct_core::plan::{PlanBuilder, PlanRank};
use serde_json::Value;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_hgct");
pub(crate) const TOKEN: &str = "0123456789abcdef0123456789abcdef-secret";
pub(crate) const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 64,
  "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
  "max_position_embeddings": 64}"#;

/// Runs share few cores: one at a time.
static MACHINE: Mutex<()> = Mutex::new(());

pub(crate) fn machine() -> MutexGuard<'static, ()> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn skip(reason: &str) {
    // Past the test runner, which swallows what a passing test prints.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("SKIPPED: {reason}\n").as_bytes());
    assert!(std::env::var_os("HGCT_FORBID_SKIP").is_none(), "a test was skipped: {reason}");
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The rows of these engines in the repository's own table, as a table; `None`, said aloud, where
/// one is not installed.
pub(crate) fn table(engines: &[&str]) -> Option<String> {
    let text = fs::read_to_string(root().join(".hgct/environments.toml")).unwrap_or_default();
    let mut table: toml::Table = text.parse().unwrap();
    let rows = table.remove("environment").and_then(|rows| rows.as_array().cloned()).unwrap_or_default();
    let found: Vec<toml::Value> = rows
        .into_iter()
        .filter(|row| engines.contains(&row["name"].as_str().unwrap()))
        .filter(|row| !row["wheel_hash"].as_str().unwrap().is_empty())
        .collect();
    if found.len() < engines.len() {
        skip(&format!("the environments of {engines:?} are not installed: run `make set-up`"));
        return None;
    }
    let rows = toml::Table::from_iter([("environment".to_owned(), toml::Value::Array(found))]);
    Some(toml::to_string(&rows).unwrap())
}

/// A folder that all tests of this crate keep their check results in.
pub(crate) fn kept() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("e2e-checks")
}

/// A folder with a job, and beside it a workspace (`--dir`).
pub(crate) struct Bench {
    pub(crate) folder: tempfile::TempDir,
}

impl Bench {
    /// With the environments of `engines`; `None`, said aloud, where one is not installed.
    pub(crate) fn new(engines: &[&str], steps: u32, checkpoint_every: u32) -> Option<Self> {
        Some(Self::with_table(&table(engines)?, steps, checkpoint_every))
    }

    /// With these environments.
    pub(crate) fn with_table(table: &str, steps: u32, checkpoint_every: u32) -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(bench.path("hgct")).unwrap();
        put(&bench.path("hgct/environments.toml"), table, 0o644);
        put(&bench.path("token"), TOKEN, 0o600);
        put(&bench.path("config.json"), CONFIG, 0o644);
        put(&bench.path("job.toml"), &job(steps, checkpoint_every), 0o644);
        // Which devices pass the check does not change from test to test.
        fs::create_dir_all(kept().join("check")).unwrap();
        fs::create_dir(bench.path("hgct/cache")).unwrap();
        std::os::unix::fs::symlink(kept().join("check"), bench.path("hgct/cache/check")).unwrap();
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn run_folder(&self, run: &str) -> PathBuf {
        self.path("hgct/runs").join(run)
    }

    /// One pipeline over (device, layers), four micro-batches of four.
    pub(crate) fn plan(&self, name: &str, stages: &[(&str, u32)]) -> PathBuf {
        self.plan_of(name, stages, 4)
    }

    /// The same with micro-batches of this many samples, sixteen in all.
    pub(crate) fn plan_of(&self, name: &str, stages: &[(&str, u32)], micro_batch: u32) -> PathBuf {
        let model = ModelSpec::from_config_json("config.json", CONFIG).unwrap();
        let rank = |(device, _): &(&str, u32)| PlanRank {
            device: DeviceId::new(*device).unwrap(),
            kind: Kind::new("cpu/any").unwrap(),
            node: NodeId::new(device.split_once('/').unwrap().0).unwrap(),
            grant: Grant { cpu_millicores: 300, cores: vec![], threads: 1, memory_bytes: 1 << 30 },
        };
        let layers: Vec<(Rank, u32)> =
            (0..).map(Rank).zip(stages.iter().map(|(_, layers)| *layers)).collect();
        let ranks = PlanBuilder::new(model, 32, 16).ranks(stages.iter().map(rank));
        let plan = ranks.pipeline(micro_batch, 16 / micro_batch, &layers);
        let path = self.path(name);
        put(&path, &hgct_core::canonical::encode(&plan.build().unwrap()), 0o644);
        path
    }

    /// `hgct --dir …` in the folder.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(BINARY);
        command.arg("--dir").arg(self.path("hgct")).current_dir(self.folder.path());
        command
    }

    /// A command to its end: its exit code and what it said on standard error.
    pub(crate) fn finish(&self, args: &[&str]) -> (i32, String) {
        let mut command = self.command();
        command.args(args);
        Running::start(command, self.path("finish.log")).finish(Duration::from_secs(150))
    }

    /// Losses of a run, by step.
    pub(crate) fn losses(&self, run: &str) -> BTreeMap<u64, f64> {
        let text = fs::read_to_string(self.run_folder(run).join("metrics.jsonl")).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|row| row["type"] == "step")
            .filter_map(|row| Some((row["step"].as_u64()?, row["loss"].as_f64()?)))
            .collect()
    }
}

pub(crate) fn job(steps: u32, checkpoint_every: u32) -> String {
    format!(
        "name = 'test'\n[model]\nconfig = 'config.json'\n[data]\npaths = ['{}/crates/hgct-core/src']\n\
         held_out = 0.05\n[recipe]\nseed = 3\nsteps = {steps}\nglobal_batch = 16\nseq_len = 32\n\
         learning_rate = 1e-3\nwarmup_steps = 10\nevaluate_samples = 16\ncheckpoint_every = {checkpoint_every}\n",
        root().display()
    )
}

pub(crate) fn put(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A process whose words go to a file; it is killed when this is dropped.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) log: PathBuf,
}

impl Running {
    pub(crate) fn start(mut command: Command, log: PathBuf) -> Self {
        let file = fs::File::create(&log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        Self { child: command.spawn().unwrap(), log }
    }

    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until `found` finds something, as long as the process lives.
    pub(crate) fn wait_for<T>(&mut self, what: &str, found: impl Fn(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(found) = found(self) {
                return found;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "no {what}, {ended:?}: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The exit code and all that was said; killed at the deadline, which is code −2.
    pub(crate) fn finish(mut self, within: Duration) -> (i32, String) {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code().unwrap_or(-1), self.said());
            }
            if Instant::now() > deadline {
                return (-2, self.said());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process and all below it.
pub(crate) fn family(of: u32) -> Vec<u32> {
    let mut parents: BTreeMap<u32, u32> = BTreeMap::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    let mut found = vec![of];
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        found.extend(parents.iter().filter(|(_, of)| **of == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    found
}

/// The process of a worker below this one, by its engine.
pub(crate) fn worker_of(of: u32, engine: &str) -> Option<u32> {
    let is_worker = |pid: &u32| {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.contains("hgct.worker") && command.contains(&format!("/env/{engine}/"))
    };
    family(of).into_iter().find(is_worker)
}

/// A signal, such as `-STOP`.
pub(crate) fn send(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// Sees all of these processes gone.
pub(crate) fn all_gone(processes: &[u32], within: Duration) {
    let deadline = Instant::now() + within;
    let lives = |pid: &&u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
    };
    while let Some(pid) = processes.iter().find(lives) {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        assert!(Instant::now() < deadline, "process {pid} lives on: {command:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
