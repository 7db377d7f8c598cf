//! What reads bytes of strangers or files of people, as functions over any bytes: they may refuse, and
//! must neither panic nor hang nor take memory without bound.
//!
//! `cargo fuzz run NAME` runs one of them under libFuzzer; `cargo test -p hgct --test fuzz` runs all of
//! them over the corpus and seeded mutations of it.

use hgct_control::auth::{Handshake, Token};
use hgct_control::frame::Decoder;
use hgct_control::message::{FromAgent, FromWorker, ToAgent, ToWorker};
use hgct_core::cluster::ClusterSpec;
use hgct_core::ids::{NodeId, RunId};
use hgct_core::job::JobSpec;
use hgct_core::manifest::Manifest;
use hgct_core::model::ModelSpec;
use hgct_core::plan::Plan;
use hgct_core::schedule::Schedule;

/// A reader of bytes; answers whether it takes them.
pub type Target = fn(&[u8]) -> bool;

/// All targets, by name.
pub const TARGETS: [(&str, Target); 10] = [
    ("control_frames", control_frames),
    ("control_handshake", control_handshake),
    ("data_frames", data_frames),
    ("config_json", config_json),
    ("job_toml", job_toml),
    ("cluster_toml", cluster_toml),
    ("plan_json", plan_json),
    ("shard_header", shard_header),
    ("manifest", manifest),
    ("token_file_header", token_file_header),
];

/// Frames of a control connection or of a worker's pipe; the first byte says in what pieces they come.
pub fn control_frames(bytes: &[u8]) -> bool {
    fn read<M: serde::de::DeserializeOwned>(bytes: &[u8], piece: usize) -> bool {
        let mut decoder = Decoder::<M>::new();
        for piece in bytes.chunks(piece) {
            decoder.push(piece);
            loop {
                match decoder.next_frame() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return false,
                }
            }
        }
        !decoder.is_inside_frame()
    }
    let Some((first, rest)) = bytes.split_first() else { return false };
    let piece = 1 + usize::from(*first);
    let all = [
        read::<ToAgent>(rest, piece),
        read::<FromAgent>(rest, piece),
        read::<ToWorker>(rest, piece),
        read::<FromWorker>(rest, piece),
    ];
    all.contains(&true)
}

/// The handshake of a control connection, either side; the first byte says which.
pub fn control_handshake(bytes: &[u8]) -> bool {
    let (Some((first, mut rest)), Ok(run), Ok(node)) =
        (bytes.split_first(), RunId::new("fuzz"), NodeId::new("node"))
    else {
        return false;
    };
    let token = Token::from_random(&[1; 32]);
    let mut side = match first % 2 {
        0 => Handshake::server(token, &run, [2; 32]),
        _ => Handshake::client(token, &node, [3; 32]),
    };
    while !rest.is_empty() {
        drop(side.output());
        let (now, later) = rest.split_at(side.wanted().clamp(1, rest.len()));
        rest = later;
        match side.receive(now) {
            Ok(None) => {}
            Ok(Some(_)) => return true,
            Err(_) => return false,
        }
    }
    true
}

/// The handshake between workers and the headers of their frames; the first byte says which.
pub fn data_frames(bytes: &[u8]) -> bool {
    let Some((first, rest)) = bytes.split_first() else { return false };
    match first % 3 {
        0 => hgct_comm::fuzzing::handshake(rest, false),
        1 => hgct_comm::fuzzing::handshake(rest, true),
        _ => hgct_comm::fuzzing::data_frame(rest),
    }
}

/// A model's `config.json`.
pub fn config_json(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    ModelSpec::from_config_json("config.json", text).is_ok_and(|model| {
        // What was taken is written and read back as the same.
        let again = ModelSpec::from_config_json("config.json", &model.to_config_json());
        assert_eq!(again.ok().as_ref(), Some(&model));
        true
    })
}

/// A job.
pub fn job_toml(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    JobSpec::from_toml("job.toml", text).is_ok_and(|job| {
        let rates = [0, 1, job.recipe.steps.saturating_sub(1), u64::MAX]
            .map(|step| job.recipe.learning_rate_at(step));
        assert!(rates.iter().all(|rate| rate.is_finite()), "{rates:?}");
        true
    })
}

/// A cluster document.
pub fn cluster_toml(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    ClusterSpec::from_toml("cluster.toml", text).is_ok_and(|cluster| {
        let again = ClusterSpec::from_toml("cluster.toml", &cluster.to_toml());
        assert_eq!(again.ok().as_ref(), Some(&cluster));
        true
    })
}

/// A plan; one that is taken has a schedule, or says why not.
pub fn plan_json(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    Plan::from_json("plan.json", text).is_ok_and(|plan| Schedule::of(&plan).is_ok())
}

/// A safetensors shard.
pub fn shard_header(bytes: &[u8]) -> bool {
    hgct_checkpoint::fuzzing::shard(bytes)
}

/// A checkpoint's manifest.
pub fn manifest(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    Manifest::from_json("manifest.json", text).is_ok()
}

/// The first bytes of a token file.
pub fn token_file_header(bytes: &[u8]) -> bool {
    hgct_data::token_file::Header::decode(bytes, bytes.len() as u64).is_ok()
}
