rule distill:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
        reference="<run>/reference/{system}/manifest.json",
        family=(
            ["<run>/distill_family/manifest.json"] if RUN.config.distill.family else []
        ),
    output:
        manifest="<run>/distill/{system}/manifest.json",
    log:
        "<run>/logs/distill/{system}.log",
    benchmark:
        "<run>/benchmarks/distill/{system}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 8
    resources:
        mem_mb=6000,
        runtime=240,
    params:
        config=str(RUN.frozen),
        key=job_key("distill"),
        prepared=subpath(input.prepared, parent=True),
        reference=subpath(input.reference, parent=True),
        family=flag_of("--start", "family"),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("distill", "{system}"),
    message:
        "distill: student potential of {wildcards.system}"
    shell:
        "exec longstride distill --config {params.config:q} --system {wildcards.system}"
        " --prepared {params.prepared:q} --reference {params.reference:q} {params.family:q}"
        " --out {params.out:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"


rule distill_family:
    input:
        prepared=expand("<run>/prepare/{system}/manifest.json", system=SYSTEMS),
        reference=expand("<run>/reference/{system}/manifest.json", system=SYSTEMS),
    output:
        manifest="<run>/distill_family/manifest.json",
    log:
        "<run>/logs/distill_family.log",
    benchmark:
        "<run>/benchmarks/distill_family.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 8
    resources:
        mem_mb=8000,
        runtime=1440,
    params:
        config=str(RUN.frozen),
        key=job_key("distill"),
        prepared=folders_of("prepared"),
        reference=folders_of("reference"),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("distill_family"),
    message:
        "distill-family: one student for all systems"
    shell:
        "exec longstride distill-family --config {params.config:q}"
        " --prepared {params.prepared:q} --reference {params.reference:q}"
        " --out {params.out:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"
