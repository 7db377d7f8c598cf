//! Bad input: one clear error, exit code 2, nothing written over. What goes wrong while a run goes
//! on: exit code 1, and the run ends in order.

use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use hgct_core::canonical::{self, Hash};
use hgct_core::cluster::{ClusterSpec, DeviceSpec, Grant, Isolation, NodeSpec};
use hgct_core::ids::{DeviceId, EnvironmentId, Kind, NodeId};
use hgct_core::model::{LayerKind, ModelSpec};
use hgct_core::profile::{DeviceProfile, LayerProfile, Profile, Spread};

use crate::support::{BINARY, Bench, CONFIG, Running, kept, machine, put, skip};

/// A cluster of one device with so much memory, and its profile.
pub(crate) fn documents(memory_bytes: u64) -> (ClusterSpec, Profile) {
    let grant = Grant { cpu_millicores: 1000, cores: vec![0], threads: 1, memory_bytes };
    let device = DeviceSpec {
        id: DeviceId::new("local/mlx:0").unwrap(),
        kind: Kind::new("cpu/mlx").unwrap(),
        vendor: "cpu".into(),
        identity: "a processor".into(),
        engine: "mlx".into(),
        device_string: "cpu".into(),
        environment: EnvironmentId::new("mlx").unwrap(),
        environment_hash: Hash::of(&"mlx"),
        framework_version: "1".into(),
        driver: None,
        memory_bytes: 0,
        host_resource: "cpu".into(),
        grant: grant.clone(),
    };
    let node = NodeSpec {
        name: NodeId::new("local").unwrap(),
        cores: 1,
        memory_bytes: 8 << 30,
        isolation: Isolation::Affinity,
        devices: vec![device.clone()],
    };
    let spread = Spread::of(vec![1_000_000]).unwrap();
    let layers = [LayerKind::Embedding, LayerKind::Block, LayerKind::Head]
        .iter()
        .flat_map(|layer| [1, 2, 4].map(|micro_batch| (*layer, micro_batch)))
        .map(|(layer, micro_batch)| LayerProfile {
            layer,
            micro_batch,
            forward: spread,
            backward: spread,
            workspace_bytes: 0,
            activation_bytes: 1 << 16,
        })
        .collect();
    let row = DeviceProfile {
        device: device.id,
        kind: device.kind,
        environment_hash: device.environment_hash,
        framework: "mlx 1".into(),
        grant,
        layers,
        reduce_ps_per_element: 1000,
        update_ps_per_element: 1000,
        import_ps_per_byte: 100,
        send_ps_per_byte: 100,
        action_overhead_ns: 1000,
        base_memory_bytes: 100 << 20,
    };
    let profile = Profile {
        format: Profile::FORMAT,
        measured_at: "2026-01-01T00:00:00Z".into(),
        model: Hash::of(&ModelSpec::from_config_json("config.json", CONFIG).unwrap()),
        seq_len: 32,
        isolation: Isolation::Affinity,
        devices: vec![row],
        links: vec![],
    };
    (ClusterSpec { format: ClusterSpec::FORMAT, nodes: vec![node] }, profile)
}

/// Fails with this code and says all of this.
fn fails(bench: &Bench, args: &[&str], code: i32, wanted: &[&str]) -> String {
    let (found, said) = bench.finish(args);
    assert_eq!(found, code, "{args:?}: {said}");
    for part in wanted {
        assert!(said.contains(part), "{args:?}: {part:?} is not in {said}");
    }
    said
}

#[test]
fn documents_that_do_not_hold_are_told_by_file_and_key() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["mlx"], 2, 0) else { return };
    let plan = ["plan", "job.toml", "--cluster", "cluster.toml", "--profile", "profile.json"];
    let write = |memory: u64| {
        let (cluster, profile) = documents(memory);
        put(&bench.path("cluster.toml"), &cluster.to_toml(), 0o644);
        put(&bench.path("profile.json"), &canonical::encode(&profile), 0o644);
    };
    // They are good, but for what each case changes.
    write(1 << 30);
    let (code, said) = bench.finish(&plan);
    assert_eq!(code, 0, "{said}");

    let cluster = fs::read_to_string(bench.path("cluster.toml")).unwrap();
    put(&bench.path("cluster.toml"), &cluster.replace("cpu_millicores", "cpu_milicores"), 0o644);
    fails(&bench, &plan, 2, &["cluster.toml", "line", "`cpu_milicores`", "did you mean `cpu_millicores`?"]);
    write(101 << 20);
    fails(&bench, &plan, 2, &["the model fits nowhere", "local/mlx:0", "are missing"]);

    write(1 << 30);
    let job = fs::read_to_string(bench.path("job.toml")).unwrap();
    let odd = job.replace("global_batch = 16", "global_batch = 6") + "[policy]\nmicro_batches = [4]\n";
    put(&bench.path("job.toml"), &odd, 0o644);
    fails(&bench, &plan, 2, &["job.toml", "`recipe.global_batch` is 6", "[4]"]);
    put(&bench.path("job.toml"), &job, 0o644);

    let good = fs::read_to_string(bench.plan("plan.json", &[("local/mlx:0", 6)])).unwrap();
    let train = ["train", "job.toml", "--plan", "plan.json"];
    put(
        &bench.path("plan.json"),
        &good.replace("\"num_micro_batches\": 4", "\"num_micro_batches\": 3"),
        0o644,
    );
    let changed = fs::read_to_string(bench.path("plan.json")).unwrap();
    assert!(changed != good, "nothing was changed");
    fails(&bench, &train, 2, &["plan.json", "16"]);
    put(&bench.path("plan.json"), &good[..good.len() / 2], 0o644);
    fails(&bench, &train, 2, &["plan.json", "line"]);
    assert!(!bench.path("hgct/runs").exists(), "a run was begun");
}

#[test]
fn what_is_not_there_is_told_by_name() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["mlx"], 2, 0) else { return };
    bench.plan("gone.json", &[("local/torch:0", 6)]);
    let train = ["train", "job.toml", "--plan", "gone.json"];
    fails(&bench, &train, 2, &["local/torch:0", "no agent has it", "nothing was trained"]);
    // It is no run: its log is elsewhere, and nobody finds it.
    assert_eq!(fs::read_dir(bench.path("hgct/runs")).unwrap().count(), 0);
    assert!(fs::read_dir(bench.path("hgct/sessions")).unwrap().count() > 0);
    fails(&bench, &["report", "latest"], 2, &["there is no run"]);
    fails(&bench, &["check", "local/none:0"], 2, &["there is no device local/none:0", "local/mlx:0"]);

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let said = fails(&bench, &["train", "job.toml", "--listen", &address, "--run", "taken"], 2, &[]);
    assert!(said.contains(&address) && said.contains("choose another port"), "{said}");
    assert!(!bench.run_folder("taken").exists(), "a run that never began has left a folder");
}

#[test]
fn an_environment_that_does_not_import_is_set_aside_with_the_reason() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["mlx"], 2, 0) else { return };
    let broken = bench.path("python");
    put(&broken, "#!/bin/sh\necho \"ImportError: libxyz.so is missing\" >&2\nexit 1\n", 0o755);
    let table = fs::read_to_string(bench.path("hgct/environments.toml")).unwrap();
    let row = format!(
        "\n[[environment]]\nname = \"jax\"\nengine = \"jax\"\ninterpreter = \"{}\"\n",
        broken.display()
    );
    put(&bench.path("hgct/environments.toml"), &(table + &row), 0o644);
    bench.plan("plan.json", &[("local/mlx:0", 6)]);
    let train = ["train", "job.toml", "--plan", "plan.json", "--run", "one"];
    fails(&bench, &train, 0, &["jax", "libxyz.so is missing"]);
    // The check has a row for it, and its exit code.
    let mut check = bench.command();
    let output = check.args(["check", "local/jax:0", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let row = &found["rows"][0];
    assert_eq!(
        (row["device"].as_str(), row["verdict"].as_str()),
        (Some("local/jax"), Some("fail")),
        "{found}"
    );
    assert!(row["kind"].as_str().is_some_and(|kind| kind.starts_with("cpu/")), "{found}");
    assert!(row["reason"].as_str().is_some_and(|reason| reason.contains("libxyz.so is missing")), "{found}");
    assert_eq!(found["rows"].as_array().unwrap().len(), 1, "{found}");
    // A plan that needs it says so.
    bench.plan("both.json", &[("local/mlx:0", 3), ("local/jax:0", 3)]);
    let train = ["train", "job.toml", "--plan", "both.json", "--run", "two"];
    fails(&bench, &train, 2, &["local/jax:0", "libxyz.so is missing"]);
}

#[test]
fn a_stale_wheel_is_told_before_anything_is_misunderstood() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["mlx"], 2, 0) else { return };
    let table = fs::read_to_string(bench.path("hgct/environments.toml")).unwrap();
    let other = table.replace("[environment.variables]", "[environment.variables]\nHGCT_CORE = \"older\"");
    assert!(other != table, "{table}");
    put(&bench.path("hgct/environments.toml"), &other, 0o644);
    bench.plan("plan.json", &[("local/mlx:0", 6)]);
    let train = ["train", "job.toml", "--plan", "plan.json"];
    fails(&bench, &train, 2, &["local/mlx:0", "wheel of this environment is stale", "make set-up"]);
}

#[test]
fn a_checkpoint_that_does_not_verify_is_passed_over() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["mlx"], 12, 4) else { return };
    bench.plan("plan.json", &[("local/mlx:0", 6)]);
    let train = ["train", "job.toml", "--plan", "plan.json"];
    fails(&bench, &[&train[..], &["--run", "one", "--until", "8"]].concat(), 0, &[]);
    let first = bench.losses("one");
    let shards = |step: u32| {
        let folder = bench.run_folder("one").join(format!("checkpoints/step-{step:08}"));
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        files
    };
    // One bit in the middle.
    let path = &shards(8)[0];
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, &bytes).unwrap();
    let resume = [&train[..], &["--resume", "one"]].concat();
    fails(&bench, &resume, 0, &["step 8 is passed over", "resuming one after step 4"]);
    let losses = bench.losses("one");
    assert_eq!(losses.len(), 12);
    assert!((4..8).all(|step| losses[&step].to_bits() == first[&step].to_bits()), "{first:?} {losses:?}");

    // Cut short, all of them: nothing is left to continue from, and nothing is touched.
    let mut cut = Vec::new();
    for step in [4, 8, 12] {
        if bench.run_folder("one").join(format!("checkpoints/step-{step:08}")).is_dir() {
            for path in shards(step) {
                fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
                cut.push(path);
            }
        }
    }
    fails(&bench, &resume, 2, &["is passed over", "has no checkpoint that verifies"]);
    assert!(cut.iter().all(|path| fs::metadata(path).unwrap().len() == 1000));
}

#[test]
fn a_full_disk_ends_the_run_in_order() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["mlx"], 12, 4) else { return };
    let plan = bench.plan("plan.json", &[("local/mlx:0", 6)]);
    let small = bench.path("small");
    fs::create_dir(&small).unwrap();
    // Room for the tokens and one copy of them, not for a checkpoint as well.
    let script = "mount -t tmpfs -o size=3m none \"$1\" || exit 77\n\
        cp \"$2\" \"$1\"/ && mkdir \"$1\"/cache && cp -r \"$3\" \"$1\"/cache/ && shift 3 && exec \"$@\"";
    let mut command = Command::new("unshare");
    if rustix::process::geteuid().as_raw() != 0 {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(&small);
    command.arg(bench.path("hgct/environments.toml")).arg(kept().join("check"));
    command.arg(BINARY).arg("--dir").arg(&small).arg("train").arg(bench.path("job.toml"));
    command.arg("--plan").arg(plan).args(["--run", "full"]);
    let (code, said) = Running::start(command, bench.path("log")).finish(Duration::from_secs(100));
    if code == 77 || said.contains("unshare failed") {
        return skip(&format!("no file system can be mounted here: {said}"));
    }
    assert_eq!(code, 1, "{said}");
    let wanted = ["the run failed: the checkpoint of step", "No space left on device"];
    assert!(wanted.iter().all(|part| said.contains(part)), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    // There is no checkpoint to continue from.
    assert!(!said.contains("--resume"), "{said}");
}
