//! The fuzz targets without a fuzzer: every target over its corpus, over good inputs made here, and over
//! seeded mutations of both. What libFuzzer finds goes into `fuzz/corpus/NAME/` and is run here from
//! then on.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../../../fuzz/src/targets.rs"]
#[allow(unreachable_pub, reason = "they are the interface of the crate for the fuzzer")]
mod targets;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use hgct_control::auth::{Handshake, Token};
use hgct_control::frame::{Outbox, encode};
use hgct_control::message::{FromWorker, ToAgent, ToWorker};
use hgct_core::canonical::{self, Hash};
use hgct_core::cluster::{ClusterSpec, DeviceSpec, Grant, Isolation, NodeSpec};
use hgct_core::dtype::DType;
use hgct_core::ids::{DeviceId, EnvironmentId, Generation, Kind, NodeId, Rank, RunId};
use hgct_core::manifest::{Manifest, Shard, ShardEntry};
use hgct_core::model::ModelSpec;
use hgct_core::plan::{Plan, PlanBuilder, PlanRank};
use hgct_core::slice::{Role, Slice};
use hgct_data::token_file::{Header, Width};

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 16,
  "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32, "rope_theta": 500.0,
  "rope_scaling": {"rope_type": "linear", "factor": 2.0}}"#;
const JOB: &str = "name = 'x'\n[model]\nconfig = 'config.json'\n[data]\npaths = ['a.txt']\n[recipe]\nsteps = 9\n\
    global_batch = 4\nseq_len = 16\nlearning_rate = 1e-3\nwarmup_steps = 3\n[policy]\nmicro_batches = [1, 2]\n";

/// Mutations of each good input.
const MUTATIONS: u64 = 10_000;
/// One input takes less than this, whatever is in it.
const SLOW: Duration = Duration::from_secs(5);

/// Good inputs of every target: at least one must be taken, or the target tests nothing.
fn seeds() -> BTreeMap<&'static str, Vec<Vec<u8>>> {
    let prefixed = |first: u8, bytes: &[u8]| [&[first][..], bytes].concat();
    let (dialer, acceptor) = hgct_comm::fuzzing::good_handshake();
    let token_file = [
        Header { width: Width::U16, vocab_size: 64, end_of_text: 0, count: 8, tokenizer_sha256: [5; 32] }
            .encode()
            .to_vec(),
        vec![0; 16],
    ]
    .concat();
    BTreeMap::from([
        ("control_frames", frames().iter().flat_map(|f| [prefixed(255, f), prefixed(6, f)]).collect()),
        ("control_handshake", {
            let (server, client) = control_handshake();
            vec![prefixed(0, &client), prefixed(1, &server)]
        }),
        (
            "data_frames",
            vec![
                prefixed(0, &dialer),
                prefixed(1, &acceptor),
                prefixed(2, &hgct_comm::fuzzing::good_data_frame()),
            ],
        ),
        ("config_json", vec![CONFIG.into()]),
        ("job_toml", vec![JOB.into()]),
        ("cluster_toml", vec![cluster().to_toml().into_bytes()]),
        ("plan_json", vec![canonical::encode(&plan()).into_bytes()]),
        ("shard_header", vec![hgct_checkpoint::fuzzing::good_shard()]),
        ("manifest", vec![canonical::encode(&manifest()).into_bytes()]),
        ("token_file_header", vec![token_file]),
    ])
}

fn grant() -> Grant {
    Grant { cpu_millicores: 500, cores: vec![0], threads: 1, memory_bytes: 1 << 30 }
}

fn plan() -> Plan {
    let model = ModelSpec::from_config_json("config.json", CONFIG).unwrap();
    let rank = |index| PlanRank {
        device: DeviceId::new(format!("n/torch:{index}")).unwrap(),
        kind: Kind::new("cpu/torch").unwrap(),
        node: NodeId::new("n").unwrap(),
        grant: grant(),
    };
    let stages = [(Rank(0), 2), (Rank(1), 2)];
    PlanBuilder::new(model, 16, 4).ranks([rank(0), rank(1)]).pipeline(1, 4, &stages).build().unwrap()
}

fn cluster() -> ClusterSpec {
    let device = DeviceSpec {
        id: DeviceId::new("n/mlx:0").unwrap(),
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
        grant: grant(),
    };
    let node = NodeSpec {
        name: NodeId::new("n").unwrap(),
        cores: 1,
        memory_bytes: 8 << 30,
        isolation: Isolation::Affinity,
        devices: vec![device],
    };
    ClusterSpec { format: ClusterSpec::FORMAT, nodes: vec![node] }
}

fn manifest() -> Manifest {
    let plan = plan();
    let entries = plan.model.tensors().into_iter().map(|tensor| ShardEntry {
        slice: Slice {
            begin: vec![0; tensor.shape.len()],
            end: tensor.shape.clone(),
            tensor: tensor.name.clone(),
        },
        key: tensor.name,
        role: Role::Parameter,
        dtype: DType::F32,
    });
    let shard = Shard {
        file: "shard-r0.safetensors".into(),
        sha256: Hash::of(&"shard"),
        size_bytes: 1 << 20,
        entries: entries.collect(),
    };
    Manifest {
        format: Manifest::FORMAT,
        run: RunId::new("fuzz").unwrap(),
        generation: Generation::default(),
        step: 4,
        num_updates: 4,
        job: Hash::of(&"job"),
        plan: plan.hash(),
        model: plan.model,
        tokenizer: None,
        shards: vec![shard],
    }
}

fn frames() -> Vec<Vec<u8>> {
    let mut outbox = Outbox::new(RunId::new("fuzz").unwrap());
    let mut frame = |message: &dyn Fn(&mut Outbox) -> Vec<u8>| message(&mut outbox);
    let generation = Generation::default();
    vec![
        frame(&|outbox| {
            let heartbeat = encode(&outbox.seal(generation, ToAgent::Heartbeat { now_ns: 7 }), &[]).unwrap();
            let hold = encode(&outbox.seal(generation, ToAgent::HoldGrants), &[]).unwrap();
            [heartbeat, hold].concat()
        }),
        frame(&|outbox| {
            let message = ToWorker::State {
                slice: Slice { tensor: "a".into(), begin: vec![0], end: vec![4] },
                role: Role::M,
            };
            encode(&outbox.seal(generation, message), &[1; 16]).unwrap()
        }),
        frame(&|outbox| {
            let message = FromWorker::ShardChunk { step: 3, num_updates: 3, offset: 9, end: None };
            encode(&outbox.seal(generation, message), &[2; 300]).unwrap()
        }),
    ]
}

/// What the server and the client of a good control handshake say, under the target's nonces.
fn control_handshake() -> (Vec<u8>, Vec<u8>) {
    let token = || Token::from_random(&[1; 32]);
    let (run, node) = (RunId::new("fuzz").unwrap(), NodeId::new("node").unwrap());
    let mut sides = [Handshake::server(token(), &run, [2; 32]), Handshake::client(token(), &node, [3; 32])];
    let mut said = [Vec::new(), Vec::new()];
    for turn in 0..12 {
        let from = turn % 2;
        let output = sides[from].output();
        said[from].extend_from_slice(&output);
        let mut rest = &output[..];
        while !rest.is_empty() {
            let to = &mut sides[1 - from];
            let (now, later) = rest.split_at(to.wanted().clamp(1, rest.len()));
            to.receive(now).unwrap();
            rest = later;
        }
    }
    let [server, client] = said;
    (server, client)
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end.max(1)
    }
}

/// Changes bytes as fuzzers do: bits, extremes, cuts, doubled and foreign pieces.
fn mutate(random: &mut Random, bytes: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(8) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at.min(end)..end)),
            4 => {
                let piece = bytes[at.min(end)..end].to_vec();
                bytes.splice(at..at, piece);
            }
            5 => {
                let from = random.below(other.len());
                let to = (from + 1 + random.below(32)).min(other.len());
                bytes.splice(at..at, other[from.min(to)..to].iter().copied());
            }
            // A length or count that is none.
            6 if bytes.len() >= 4 => {
                let at = at.min(bytes.len() - 4);
                let value = [0, 1, u32::MAX, i32::MAX as u32, 1 << 20][random.below(5)];
                bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            _ => {
                // Digits grow, so that numbers in text become large.
                let digit =
                    (0..bytes.len()).map(|i| (at + i) % bytes.len()).find(|i| bytes[*i].is_ascii_digit());
                if let Some(digit) = digit {
                    let many = ["9999999999", "18446744073709551615", "-1", "1e308", "0"][random.below(5)];
                    bytes.splice(digit..=digit, many.bytes());
                }
            }
        }
    }
    bytes
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = root.join("fuzz/corpus").join(name);
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    // What people really have.
    match name {
        "config_json" => paths.push(root.join("examples/quickstart/config.json")),
        "job_toml" => paths.push(root.join("examples/quickstart/job.toml")),
        _ => {}
    }
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn no_target_panics_or_hangs_on_anything() {
    let seeds = seeds();
    let mut found = Vec::new();
    for (name, target) in targets::TARGETS {
        let good = &seeds[name];
        for (index, bytes) in good.iter().enumerate() {
            if !target(bytes) {
                found.push(format!("{name} does not take its good input {index}"));
            }
        }
        let all: Vec<Vec<u8>> = good.iter().cloned().chain(corpus(name)).collect();
        let mut random =
            Random(name.bytes().fold(1, |seed: u64, byte| seed.wrapping_mul(31) + u64::from(byte)));
        let (mut taken, mut refused) = (0, 0);
        for round in 0..MUTATIONS {
            let (seed, other) = (random.below(all.len()), random.below(all.len()));
            let bytes = mutate(&mut random, &all[seed], &all[other]);
            let begun = Instant::now();
            let ended = std::panic::catch_unwind(|| target(&bytes));
            let Ok(takes) = ended else {
                found.push(format!(
                    "{name}, round {round}: it panics on {:?}",
                    String::from_utf8_lossy(&bytes)
                ));
                break;
            };
            assert!(begun.elapsed() < SLOW, "{name}, round {round}: {:?}", begun.elapsed());
            *(if takes { &mut taken } else { &mut refused }) += 1;
        }
        println!("{name}: {taken} taken, {refused} refused");
        if refused == 0 {
            found.push(format!("{name} takes anything"));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn every_target_has_a_program_for_the_fuzzer() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let manifest: toml::Table = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap().parse().unwrap();
    let programs: Vec<&str> =
        manifest["bin"].as_array().unwrap().iter().map(|bin| bin["name"].as_str().unwrap()).collect();
    assert_eq!(programs, targets::TARGETS.map(|(name, _)| name));
    for name in programs {
        let text = std::fs::read_to_string(folder.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(text.contains(&format!("hgct_fuzz::{name}(")), "{name}: {text}");
    }
}
