//! Two hosts, made of namespaces: networks, mounts and process tables of their own.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::{BINARY, Bench, Running, TOKEN, machine, put, root, skip, table, worker_of};

/// A network and mount namespace, which go when the process that holds them does.
pub(crate) struct Namespace {
    holder: std::process::Child,
    user: bool,
}

impl Namespace {
    /// One of its own, or one inside the user namespace of another.
    pub(crate) fn new(within: Option<&Self>, user: bool) -> Result<Self, String> {
        let mut command = match within {
            Some(outer) => outer.enter("unshare"),
            None => Command::new("unshare"),
        };
        if within.is_none() && user {
            command.args(["--user", "--map-root-user"]);
        }
        // It says when it is in there.
        command.args(["--net", "--mount", "sh", "-c", "echo in; exec sleep 600"]);
        let mut holder = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("unshare cannot be started: {error}"))?;
        let mut line = [0; 3];
        let out = holder.stdout.as_mut().unwrap();
        if std::io::Read::read_exact(out, &mut line).is_err() {
            let output = holder.wait_with_output().unwrap();
            return Err(format!("no namespaces: {}", String::from_utf8_lossy(&output.stderr)));
        }
        Ok(Self { holder, user })
    }

    fn pid(&self) -> String {
        self.holder.id().to_string()
    }

    /// A program in there.
    pub(crate) fn enter(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid(), "--net", "--mount"]);
        if self.user {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.arg("--").arg(program);
        command
    }

    pub(crate) fn sh(&self, script: &str) -> Result<(), String> {
        let output = self.enter("sh").args(["-ec", script]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(format!("{script}: {said}")) }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A middle with a bridge, 10.77.0.1, and two hosts at it, 10.77.0.2 and 10.77.0.3.
pub(crate) fn network() -> Result<[Namespace; 3], String> {
    // As root without a user namespace: then control groups may be written too.
    let user = fs::metadata("/proc/self").unwrap().uid() != 0;
    let middle = Namespace::new(None, user)?;
    middle.sh("ip link set lo up; ip link add br0 type bridge; ip addr add 10.77.0.1/24 dev br0; ip link set br0 up")?;
    let host = |name: &str, address: &str| {
        let host = Namespace::new(Some(&middle), user)?;
        middle.sh(&format!(
            "ip link add {name} type veth peer name eth0 netns {}; ip link set {name} master br0 up",
            host.pid()
        ))?;
        host.sh(&format!("ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up"))?;
        Ok::<_, String>(host)
    };
    let (east, west) = (host("east", "10.77.0.2")?, host("west", "10.77.0.3")?);
    Ok([middle, east, west])
}

fn train(bench: &Bench, at: &Namespace, more: &[&str]) -> Running {
    let mut command = at.enter(BINARY);
    command.arg("--dir").arg(bench.path("hgct")).arg("train").arg(bench.path("job.toml"));
    command.args(["--agents", "2", "--no-local-agent", "--listen", "10.77.0.1:0", "--run", "two-hosts"]);
    command.arg("--token-file").arg(bench.path("token")).args(more);
    Running::start(command, bench.path("train.log"))
}

pub(crate) fn address(train: &mut Running) -> String {
    train.wait_for("address", |train| {
        let said = train.said();
        let (_, rest) = said.split_once("agents at ")?;
        Some(rest.split_once(';')?.0.to_owned())
    })
}

/// An agent that sees nothing of the coordinator's folder, of its processes or of its shared memory.
fn agent(at: &Namespace, hidden: &Path, folder: &Path, join: &str, name: &str, address: &str) -> Running {
    at.sh(&format!("mount -t tmpfs none {}; mount -t tmpfs none /dev/shm", hidden.display())).unwrap();
    let mut command = at.enter("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", BINARY, "--dir"]);
    command.arg(folder).args(["agent", "--join", join, "--name", name, "--listen", address]);
    command.arg("--token-file").arg(folder.join("token"));
    Running::start(command, folder.join("agent.log"))
}

/// What a host starts with: its environment and the token.
fn host_folder(engine: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    put(&folder.path().join("environments.toml"), &table(&[engine]).unwrap(), 0o644);
    put(&folder.path().join("token"), TOKEN, 0o600);
    folder
}

#[test]
fn two_hosts_train_one_model_with_nothing_in_common_but_a_wire() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["jax", "mlx"], 20, 10) else { return };
    let [middle, east, west] = match network() {
        Ok(network) => network,
        Err(reason) => return skip(&reason),
    };
    let job = fs::read_to_string(bench.path("job.toml")).unwrap();
    put(&bench.path("job.toml"), &format!("{job}[policy]\nmin_kinds = 2\nmicro_batches = [2, 4]\n"), 0o644);
    let mut train = train(&bench, &middle, &[]);
    let join = address(&mut train);
    let folders = [host_folder("jax"), host_folder("mlx")];
    let hidden = bench.folder.path();
    let agents = [
        agent(&east, hidden, folders[0].path(), &join, "east", "10.77.0.2"),
        agent(&west, hidden, folders[1].path(), &join, "west", "10.77.0.3"),
    ];
    let (code, said) = train.finish(Duration::from_secs(170));
    let logs = || agents.each_ref().map(Running::said).join("\n");
    assert_eq!(code, 0, "{said}\n{}", logs());
    let logs = logs();
    for agent in agents {
        assert_eq!(agent.finish(Duration::from_secs(10)).0, 0, "{logs}");
    }

    let losses = bench.losses("two-hosts");
    assert_eq!(losses.len(), 20, "{said}");
    assert!(losses[&19] < losses[&0], "{losses:?}");
    let run = bench.run_folder("two-hosts");
    let json =
        |name: &str| -> Value { serde_json::from_str(&fs::read_to_string(run.join(name)).unwrap()).unwrap() };
    let mut used: Vec<String> = json("plan.json")["ranks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rank| rank["device"].as_str().unwrap().to_owned())
        .collect();
    used.sort();
    assert_eq!(used, ["east/jax:0", "west/mlx:0"]);
    let profile = json("profile.json");
    let links = profile["links"].as_array().unwrap();
    assert!(links.len() == 2 && links.iter().all(|link| link["transport"] == "tcp"), "{links:?}");

    // The checkpoint is with the coordinator and whole; the text went over the wire by content.
    let (code, inspected) = bench.finish(&["ckpt", "inspect", "two-hosts", "--json"]);
    assert_eq!(code, 0, "{inspected}");
    let summary: Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(summary["step"], 20);
    for folder in &folders {
        assert!(fs::read_dir(folder.path().join("blobs")).unwrap().count() > 0);
        assert!(!folder.path().join("runs").exists());
    }
}

#[test]
fn an_agent_that_does_not_come_is_told_at_the_deadline() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["mlx"], 20, 10) else { return };
    let mut command = bench.command();
    command.args([
        "train",
        "job.toml",
        "--agents",
        "2",
        "--no-local-agent",
        "--gather",
        "3",
        "--token-file",
        "token",
    ]);
    let mut train = Running::start(command, bench.path("train.log"));
    let join = address(&mut train);
    let folder = host_folder("mlx");
    let mut command = Command::new(BINARY);
    command.arg("--dir").arg(folder.path()).args(["agent", "--join", &join, "--name", "east"]);
    command.arg("--token-file").arg(folder.path().join("token"));
    let agent = Running::start(command, folder.path().join("agent.log"));
    let (code, said) = train.finish(Duration::from_secs(10));
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("1 of 2 agents"), "{said}");
    assert_eq!(fs::read_dir(bench.path("hgct/runs")).unwrap().count(), 0, "what never began is a run");
    let (code, said) = agent.finish(Duration::from_secs(10));
    assert!(code == 0 || code == 1, "{said}");
}

#[test]
fn one_job_mixes_versions_of_python() {
    let _machine = machine();
    let file = root().join(".hgct/second/.hgct/environments.toml");
    let second: toml::Table = fs::read_to_string(file).unwrap_or_default().parse().unwrap();
    let rows = second.get("environment").and_then(|rows| rows.as_array().cloned()).unwrap_or_default();
    let is_ready =
        |row: &&toml::Value| row.get("unusable").is_none() && row["wheel_hash"].as_str() != Some("");
    let Some(second) = rows.iter().find(is_ready) else {
        // Not a test that was skipped: there is nothing to test on such a machine.
        let reason =
            "UNTRIED: one job over two versions of Python: `make test` installs the second where one is\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), reason.as_bytes());
        return;
    };
    let Some(first) = table(&["jax"]) else { return };
    let first: toml::Table = first.parse().unwrap();
    let first = &first["environment"][0];
    assert_ne!(first["python_version"], second["python_version"]);
    let both = toml::Value::Array(vec![first.clone(), second.clone()]);
    let both = toml::to_string(&toml::Table::from_iter([("environment".to_owned(), both)])).unwrap();
    let bench = Bench::with_table(&both, 12, 0);
    let device = format!("local/{}:0", second["name"].as_str().unwrap());
    let plan = bench.plan("plan.json", &[("local/jax:0", 3), (&device, 3)]);
    let mut command = bench.command();
    command.args(["train", "job.toml", "--run", "mixed", "--plan"]).arg(plan);
    let mut train = Running::start(command, bench.path("train.log"));
    let of = train.child.id();
    let interpreters = train.wait_for("workers", |_| {
        let workers = ["jax", second["name"].as_str().unwrap()].map(|name| worker_of(of, name));
        let [Some(a), Some(b)] = workers else { return None };
        let program = |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).ok();
        Some([program(a)?, program(b)?])
    });
    assert_ne!(interpreters[0], interpreters[1]);
    let (code, said) = train.finish(Duration::from_secs(100));
    assert_eq!(code, 0, "{said}");
    let losses = bench.losses("mixed");
    assert_eq!(losses.len(), 12);
    assert!(losses[&11] < losses[&0], "{losses:?}");
}
