//! Nothing here depends on how fast the machine is, except that larger work takes longer.

use std::time::{Duration, Instant};

use hgct_core::canonical::Hash;
use hgct_core::cluster::Grant;
use hgct_core::ids::{DeviceId, Kind};
use hgct_core::model::{LayerKind, ModelSpec};

use super::{Request, run};
use crate::reference::{Fault, FaultyEngine, ReferenceEngine, SMALL_MEMORY_TOKENS};

fn request(micro_batches: &[u32], budget: Duration) -> Request {
    let config = r#"{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6,
        "num_attention_heads": 2, "num_key_value_heads": 1}"#;
    Request {
        device: DeviceId::new("local/reference:0").unwrap(),
        kind: Kind::new("cpu/reference").unwrap(),
        environment_hash: Hash::of_bytes(b"environment"),
        grant: Grant { cpu_millicores: 1000, cores: Vec::new(), threads: 1, memory_bytes: 1 << 30 },
        model: ModelSpec::from_config_json("config.json", config).unwrap(),
        seq_len: 16,
        micro_batches: micro_batches.to_vec(),
        budget,
    }
}

#[test]
fn every_kind_of_layer_has_a_row_at_every_size() {
    let profile = run(&mut ReferenceEngine::new(), &request(&[8, 1], Duration::from_secs(2))).unwrap();
    assert_eq!(profile.micro_batches(), [1, 8]);
    for kind in [LayerKind::Embedding, LayerKind::Block, LayerKind::Head] {
        for size in [1, 8] {
            let row = profile.layer(kind, size).unwrap();
            assert!(row.forward.num_samples >= 3 && row.activation_bytes > 0, "{row:?}");
            assert!(
                row.forward.min_ns <= row.forward.median_ns && row.forward.median_ns <= row.forward.max_ns
            );
        }
    }
    let block = |size| profile.layer(LayerKind::Block, size).unwrap();
    assert!(block(8).forward.median_ns > 2 * block(1).forward.median_ns, "{profile:?}");
    assert!(block(1).backward.median_ns > 0);
    assert!(profile.update_ps_per_element > profile.reduce_ps_per_element, "{profile:?}");
    for figure in [profile.reduce_ps_per_element, profile.import_ps_per_byte, profile.send_ps_per_byte] {
        assert!(figure > 0, "{profile:?}");
    }
    assert!(profile.action_overhead_ns > 0);
}

#[test]
fn a_size_that_does_not_fit_is_left_out() {
    let mut small = FaultyEngine::new(ReferenceEngine::new(), Fault::SmallMemory);
    let fits = (SMALL_MEMORY_TOKENS / 16) as u32;
    let profile = run(&mut small, &request(&[fits, fits + 1], Duration::from_secs(1))).unwrap();
    assert_eq!(profile.micro_batches(), [fits]);
    let error = run(&mut small, &request(&[fits + 1], Duration::from_secs(1))).unwrap_err();
    assert!(error.to_string().contains("tokens do not fit"), "{error}");
}

#[test]
fn an_engine_that_hangs_ends_with_the_budget() {
    let mut engine = FaultyEngine::new(ReferenceEngine::new(), Fault::Hang);
    let start = Instant::now();
    let error = run(&mut engine, &request(&[1], Duration::from_millis(300))).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(error.to_string().contains("backward"), "{error}");
}
