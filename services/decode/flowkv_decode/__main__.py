from flowkv_common.node.main import main

if __name__ == "__main__":
    main("decode")
