//! Discards.

use anyhow::Result;
use bench_work::offsets::Offsets;
use bench_work::protocol::{Kind, Work};

use super::Bench;
use crate::contender::Contender::{ImagoSync, Library, Raw};
use crate::contender::Field;
use crate::figures::{Line, microseconds};
use crate::place::{GIB, MIB, Resident, STRETCH, Shape, opening};

/// Time in the call. The raw file punches the hole at once, which is the only thing it can do.
pub fn discard(bench: &mut Bench) -> Result<Vec<Line>> {
    let contenders = [Raw, Library, ImagoSync];
    let scale = bench.scale;
    let mut lines = Vec::new();
    for (place, size, resident) in [(&bench.tmpfs, 4 * GIB, Resident::Blocks), (&bench.disk, 256 * MIB, Resident::All)]
    {
        let shape = Shape::mapped(scale.size(size), 64 << 10, resident);
        shape.make(place, "discard", &contenders)?;
        let mut field = Field::open(&contenders, |who| Ok(opening(&place.of(who, "discard"))))?;
        let rounds = scale.rounds().min(16);
        // Punching is slow: fewer on the disk.
        let most = if place.name == bench.disk.name { 50 } else { 1_000 };
        let each = most.min(shape.stretches() / rounds);
        let samples = field.rounds(rounds, true, |round| {
            let offsets =
                Offsets::Shuffled { units: shape.stretches(), unit: STRETCH, within: 0, seed: 3, skip: round * each };
            Work::new(Kind::Discard, STRETCH as usize, offsets, each)
        })?;
        field.close()?;
        let work = format!("discard of a 64 KiB cluster, random order, {}", place.name);
        let mut line = Line::new("discard", work, "µs").at_most(0.25);
        for (&who, rounds) in &samples {
            line = line.value(who, microseconds(rounds));
        }
        lines.push(line);
        place.clear()?;
    }
    Ok(lines)
}
