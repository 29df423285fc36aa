rule distill:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
        reference="<run>/reference/{system}/manifest.json",
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
        out=subpath(output.manifest, parent=True),
        state=RUN.state("distill", "{system}"),
    message:
        "distill: student potential of {wildcards.system}"
    shell:
        "exec longstride distill --config {params.config:q} --system {wildcards.system}"
        " --prepared {params.prepared:q} --reference {params.reference:q}"
        " --out {params.out:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"
