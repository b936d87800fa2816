// The networks of the book, layer by layer, with the names of their weights. Part of the worker of a live figure.

// diffusers' UNet2DModel and UNet2DConditionModel of two levels, as bilevel_core/lab/models/networks.py builds them.
class UNet {
  constructor(weights) {
    this.w = weights;
    this.shifts = {}; // by what has asked for them: what each block adds for its time and text
    this.levels = 0;
    while (weights.has(`down_blocks.${this.levels}.resnets.0.conv1.weight`)) this.levels += 1;
    this.channels = weights.raw("conv_in.bias").shape[0];
  }

  // What the network is told, at `time` (a number) and by `classes` (B, width) or nothing: the shift of every block.
  told(key, time, classes = null) {
    if (this.shifts[key]) return this.shifts[key];
    const w = this.w, n = this.channels / 2, waves = new Float32Array(2 * n);
    for (let i = 0; i < n; i += 1) {
      const angle = time * Math.exp((-Math.log(10000) * i) / n);
      [waves[i], waves[n + i]] = [Math.cos(angle), Math.sin(angle)];
    }
    const out = tf.tidy(() => {
      let e = linear(w, "time_embedding.linear_2", silu(linear(w, "time_embedding.linear_1", tf.tensor2d(waves, [1, 2 * n]))));
      if (classes) e = tf.add(e, linear(w, "class_embedding", classes));
      e = silu(e);
      const rows = {};
      for (const block of this.blocks()) {
        const row = linear(w, `${block}.time_emb_proj`, e);
        rows[block] = tf.reshape(row, [-1, 1, 1, row.shape[1]]);
      }
      return rows;
    });
    Object.values(out).forEach(tf.keep);
    return (this.shifts[key] = out);
  }
  forget(keep = () => false) {
    for (const key of Object.keys(this.shifts)) {
      if (keep(key)) continue;
      tf.dispose(this.shifts[key]);
      delete this.shifts[key];
    }
  }
  blocks() {
    const out = ["mid_block.resnets.0", "mid_block.resnets.1"];
    for (let i = 0; i < this.levels; i += 1) {
      out.push(`down_blocks.${i}.resnets.0`, `up_blocks.${i}.resnets.0`, `up_blocks.${i}.resnets.1`);
    }
    return out;
  }

  resnet(name, x, shifts) {
    const w = this.w;
    let h = conv(w, `${name}.conv1`, silu(groupNorm(w, `${name}.norm1`, x)));
    h = tf.add(h, shifts[name]);
    h = conv(w, `${name}.conv2`, silu(groupNorm(w, `${name}.norm2`, h)));
    return tf.add(w.has(`${name}.conv_shortcut.weight`) ? conv(w, `${name}.conv_shortcut`, x) : x, h);
  }
  // Transformer2DModel of one block, 8 heads; words (B, L, width)
  attention(name, x, words) {
    const w = this.w, [B, H, W, C] = x.shape, block = `${name}.transformer_blocks.0`;
    let h = tf.reshape(conv(w, `${name}.proj_in`, groupNorm(w, `${name}.norm`, x, 8, 1e-6)), [B, H * W, C]);
    for (const [norm, attn] of [["norm1", "attn1"], ["norm2", "attn2"]]) {
      const q = layerNorm(w, `${block}.${norm}`, h), from = attn === "attn1" ? q : words;
      const part = (which, v) => linearRows(w, `${block}.${attn}.${which}`, v);
      h = tf.add(h, part("to_out.0", attend(part("to_q", q), part("to_k", from), part("to_v", from), 8)));
    }
    const [value, gate] = tf.split(linearRows(w, `${block}.ff.net.0.proj`, layerNorm(w, `${block}.norm3`, h)), 2, 2);
    h = tf.add(h, linearRows(w, `${block}.ff.net.2`, tf.mul(value, gelu(gate))));
    return tf.add(conv(w, `${name}.proj_out`, tf.reshape(h, [B, H, W, C])), x);
  }

  // x (B, H, W, C), shifts of `told`, words of a prompt (B, L, width) or nothing
  forward(x, shifts, words = null) {
    const w = this.w, last = this.levels - 1;
    let h = conv(w, "conv_in", x);
    const skips = [h];
    for (let i = 0; i < this.levels; i += 1) {
      skips.push((h = this.resnet(`down_blocks.${i}.resnets.0`, h, shifts)));
      if (i < last) skips.push((h = conv(w, `down_blocks.${i}.downsamplers.0.conv`, h, 2)));
    }
    h = this.resnet("mid_block.resnets.0", h, shifts);
    if (words) h = this.attention("mid_block.attentions.0", h, words);
    h = this.resnet("mid_block.resnets.1", h, shifts);
    for (let i = 0; i < this.levels; i += 1) {
      for (const j of [0, 1]) h = this.resnet(`up_blocks.${i}.resnets.${j}`, tf.concat([h, skips.pop()], 3), shifts);
      if (i < last) {
        const [, H, W] = h.shape;
        h = conv(w, `up_blocks.${i}.upsamplers.0.conv`, tf.image.resizeNearestNeighbor(h, [2 * H, 2 * W]));
      }
    }
    return conv(w, "conv_out", silu(groupNorm(w, "conv_norm_out", h)));
  }
}

// The text-to-digit denoiser by classifier-free guidance, for one prompt and a fixed number of images; folded by two.
class PromptedDenoiser {
  // ids of the prompt and of the empty one, the same for all images
  constructor(tensors, prompt, empty, scale) {
    [this.scale, this.unet] = [scale, new UNet(new Weights(tensors, "text_denoiser.unet."))];
    const table = tensors["text_denoiser.words.weight"], places = tensors["text_denoiser.places"].data;
    const width = table.shape[1];
    this.texts = [prompt, empty].map((ids) => {
      const words = new Float32Array(ids.length * width), mean = new Float32Array(width);
      ids.forEach((id, k) => {
        for (let j = 0; j < width; j += 1) {
          const value = table.data[id * width + j];
          words[k * width + j] = value + places[k * width + j];
          mean[j] += value / ids.length;
        }
      });
      return { words, mean, length: ids.length, width };
    });
    [this.rows, this.prepared] = [0, null];
  }
  prepare(n) {
    if (this.rows === n) return;
    this.dispose();
    const [a, b] = this.texts, row = (key, shape) => tf.tidy(() => {
      const parts = [a, b].map((text) => tf.tile(tf.tensor(text[key], [1, ...shape]), [n, ...shape.map(() => 1)]));
      return tf.keep(tf.concat(parts, 0));
    });
    this.prepared = { words: row("words", [a.length, a.width]), classes: row("mean", [a.width]) };
    this.rows = n;
  }
  dispose() {
    this.unet.forget();
    if (this.prepared) tf.dispose(this.prepared);
    [this.rows, this.prepared] = [0, null];
  }
  // eps(x, t, "") + scale (eps(x, t, prompt) - eps(x, t, "")), both in one call; x (B, 14, 14, 4)
  eps(x, t) {
    this.prepare(x.shape[0]);
    const { words, classes } = this.prepared;
    const [given, without] = tf.split(this.unet.forward(tf.concat([x, x], 0), this.unet.told(t, t - 1, classes), words), 2, 0);
    return tf.add(without, tf.mul(tf.sub(given, without), this.scale));
  }
}

// The 8x8 denoiser that is told the level; x (B, 8, 8, 1), level in radians
class LevelDenoiser {
  constructor(tensors, stretch) {
    [this.stretch, this.unet] = [stretch, new UNet(new Weights(tensors, "level_denoiser.unet."))];
  }
  eps(x, level) {
    const time = Math.fround(this.stretch * Math.fround(level)), shifts = this.unet.told(time, time);
    return this.unet.forward(x, shifts);
  }
}

// Unit vectors (B, D) of images (B, 28, 28, 1): the picture's side of open_clip's CLIP with grey in all three channels.
class PictureEncoder {
  constructor(tensors) {
    const w = (this.w = new Weights(tensors, "clip.visual."));
    this.depth = 0;
    while (w.has(`transformer.resblocks.${this.depth}.ln_1.weight`)) this.depth += 1;
    this.heads = w.raw("class_embedding").shape[0] / 32;
  }
  encode(images) {
    const w = this.w, width = w.raw("class_embedding").shape[0], B = images.shape[0];
    const filter = w.keep("grey", () => tf.sum(w.filter("conv1.weight"), 2, true));
    let x = tf.reshape(tf.conv2d(images, filter, filter.shape[0], "valid"), [B, -1, width]);
    x = tf.concat([tf.tile(tf.reshape(w.vector("class_embedding"), [1, 1, width]), [B, 1, 1]), x], 1);
    const places = w.keep("places", () => tf.tensor(w.raw("positional_embedding").data, [1, ...w.raw("positional_embedding").shape]));
    x = layerNorm(w, "ln_pre", tf.add(x, places));
    for (let i = 0; i < this.depth; i += 1) {
      const name = `transformer.resblocks.${i}`, h = layerNorm(w, `${name}.ln_1`, x), [b, L, C] = h.shape;
      const inside = tf.matMul(tf.reshape(h, [b * L, C]), w.matrix(`${name}.attn.in_proj_weight`));
      const [q, k, v] = tf.split(tf.reshape(tf.add(inside, w.vector(`${name}.attn.in_proj_bias`)), [b, L, 3 * C]), 3, 2);
      x = tf.add(x, linearRows(w, `${name}.attn.out_proj`, attend(q, k, v, this.heads)));
      const inner = gelu(linearRows(w, `${name}.mlp.c_fc`, layerNorm(w, `${name}.ln_2`, x)));
      x = tf.add(x, linearRows(w, `${name}.mlp.c_proj`, inner));
    }
    const token = layerNorm(w, "ln_post", tf.reshape(tf.slice(x, [0, 0, 0], [B, 1, width]), [B, width]));
    const out = tf.matMul(token, w.keep("proj", () => tf.tensor(w.raw("proj").data, w.raw("proj").shape)));
    return tf.mul(out, tf.rsqrt(tf.sum(tf.square(out), 1, true)));
  }
}

// Features (B, 32) of images (B, 8, 8, 1): convolutions with their batch norms, as in evaluation; then a linear map.
class Classifier8 {
  constructor(tensors) {
    this.w = new Weights(tensors, "classifier.");
  }
  block(i, x, stride) {
    const w = this.w, name = `body.${i}`, norm = `${name}.1`;
    const gain = w.keep(`gain ${i}`, () => tf.mul(w.vector(`${norm}.weight`), tf.rsqrt(tf.add(w.vector(`${norm}.running_var`), 1e-5))));
    const shift = w.keep(`shift ${i}`, () => tf.sub(w.vector(`${norm}.bias`), tf.mul(w.vector(`${norm}.running_mean`), gain)));
    return silu(tf.add(tf.mul(conv(w, `${name}.0`, x, stride), gain), shift));
  }
  features(images) {
    const w = this.w, h = this.block(2, this.block(1, this.block(0, images, 1), 2), 1);
    const flat = tf.reshape(tf.transpose(h, [0, 3, 1, 2]), [images.shape[0], -1]); // channels first, as in PyTorch
    return tf.div(tf.sub(linear(w, "to_features", flat), w.vector("centre")), w.raw("scale").data[0]);
  }
}
